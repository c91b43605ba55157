"""A pretraining run from its folder's opening to its last file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mae_transfer.engine.checkpoints import open_state
from mae_transfer.engine.config import build_config, flatten, to_dict, to_yaml
from mae_transfer.engine.distribution import Processes, is_restart
from mae_transfer.engine.metrics import MetricsLog
from mae_transfer.engine.run_folder import RunFolder, open_run_folder
from mae_transfer.engine.trainer import Hook
from mae_transfer.errors import ConfigError
from pretrain.config import PretrainConfig
from pretrain.load import load_initial_weights
from pretrain.monitor import monitors
from pretrain.objective import PretrainRun

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: nothing that changes the losses.
_FREE_ON_RESUME = (
    *("run.dir", "run.resume", "run.overwrite", "checkpoint.", "log.", "probe.", "data.workers"),
    *("data.path", "data.val_path", "data.scan_cache", "data.max_unreadable", "train.max_skipped", "train.device"),
    # Weights that a run began with; one that goes on has its own.
    "init_checkpoint",
    # The same batches and, but for rounding, the same numbers: what another number of machines may make necessary.
    *("train.distributed", "train.accumulate", "train.compile", "model.checkpointing"),
)


def pretrain(config: PretrainConfig, processes: Processes) -> str | None:
    """Run, or continue, a pretraining to its end.

    Returns:
        None, or the name of the signal that stopped it (the state is saved).

    Raises:
        UserError: anything wrong with config or data, before training starts.
        RunFailed: too many unreadable images or steps that were not finite; the disk full.
    """
    # First, as a mistake in config or data leaves no folder behind.
    run = PretrainRun(config, processes)
    if config.init_checkpoint is not None:
        logger.info("%s", load_initial_weights(run.model, config.init_checkpoint))
    hooks = monitors(run, RunFolder(config.run.dir))
    folder, checkpoint = _open_folder(config, processes)
    with folder.in_use() if processes.is_main else nullcontext():
        return _train(run, folder, checkpoint, hooks)


def _train(run: PretrainRun, folder: RunFolder, checkpoint: Path | None, hooks: Sequence[Hook]) -> str | None:
    config, processes = run.config, run.processes
    trainer = run.trainer(folder)
    trainer.hooks = hooks
    if checkpoint is not None:
        state = open_state(checkpoint)
        _check_same_run(state.facts["config"], config)
        trainer.load(state)
        logger.info("continuing from step %d of %d (%s)", trainer.step, run.num_steps, checkpoint)
    else:
        logger.info(
            "%d images, %d steps of %d, %s on %s, writing to %s",
            *(run.num_samples, run.num_steps, config.train.batch_size, config.train.precision),
            *(processes.device, folder.root),
        )
    if processes.is_main:
        folder.write_description(to_yaml(config.resolved()))
        if checkpoint is not None:
            _bring_metrics(checkpoint, folder)
        tensorboard = folder.tensorboard if config.log.tensorboard else None
        trainer.metrics = MetricsLog(
            folder.metrics,
            last_step=trainer.step,
            tensorboard=tensorboard,
            wandb=config.log.wandb,
            config=to_dict(config.resolved()),
        )
    try:
        stopped_by = trainer.run()
    finally:
        if trainer.metrics is not None:
            trainer.metrics.close()
    run.count_unreadable()
    logger.info("%s", run.unreadable.summary())
    if stopped_by is None:
        run.write_weights(folder, trainer.average)
    return stopped_by


def _open_folder(config: PretrainConfig, processes: Processes) -> tuple[RunFolder, Path | None]:
    """The main process makes the folder; what it finds out, bad news included, holds for all of them."""
    return processes.on_main(lambda: open_run_folder(config.run, restarted=is_restart()))


def _bring_metrics(checkpoint: Path, folder: RunFolder) -> None:
    """When a run goes on in another folder, its lines come along."""
    origin = checkpoint.parent.parent / "metrics.jsonl"
    if not folder.metrics.exists() and origin.is_file():
        folder.metrics.write_text(origin.read_text(encoding="utf-8"), encoding="utf-8")


def _check_same_run(before: dict[str, Any], config: PretrainConfig) -> None:
    """Raises ConfigError where a key that changes the losses differs from the checkpoint's."""
    # Read back through the schema, so that a key added since the checkpoint was written stands at its default.
    now, then = flatten(to_dict(config.resolved())), flatten(to_dict(build_config(PretrainConfig, before).resolved()))
    changed = [
        f"{key} was {then[key]}, is {now[key]}"
        for key in sorted(now)
        if now[key] != then[key] and not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"this is not a continuation of the same run: {'; '.join(changed)}. Give the same values, or start a new "
            "run in another run.dir"
        )
