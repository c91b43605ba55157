"""A run from its folder's opening to its last file: what every objective goes through."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mae_transfer.engine.checkpoints import TrainingState, open_state
from mae_transfer.engine.config import build_config, flatten, to_dict, to_yaml
from mae_transfer.engine.distribution import is_restart
from mae_transfer.engine.metrics import MetricsLog
from mae_transfer.engine.objective import Objective, RunSettings
from mae_transfer.engine.run_folder import RunFolder, open_run_folder
from mae_transfer.engine.trainer import Hook, Trainer
from mae_transfer.errors import ConfigError

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: nothing that changes the losses.
FREE_ON_RESUME = (
    *("run.dir", "run.resume", "run.overwrite", "checkpoint.", "log.", "data.workers", "data.scan_cache"),
    *("data.max_unreadable", "train.max_skipped", "train.device"),
    # Weights that a run began with; one that goes on has its own.
    "init_checkpoint",
    # The same batches and, but for rounding, the same numbers: what another number of machines may make necessary.
    *("train.distributed", "train.accumulate", "train.compile", "model.checkpointing"),
)


def carry_out(
    run: Objective[Any],
    hooks: Sequence[Hook],
    *,
    free: Sequence[str] = (),
    bound: Sequence[str] = (),
    finish: Callable[[RunFolder, Trainer[Any]], None] = lambda folder, trainer: None,
) -> str | None:
    """Train ``run`` in its folder, or go on where it stopped, to its end.

    Args:
        free: keys, besides ``FREE_ON_RESUME``, that a continuation may change; a prefix where they end in a dot.
        bound: keys of ``FREE_ON_RESUME`` that change what this run learns.
        finish: called on every process when the weights are written: what fails there loses nothing.

    Returns:
        None, or the name of the signal that stopped it (the state is saved).

    Raises:
        UserError: a folder that cannot be used, a checkpoint of another run.
        RunFailed: too many unreadable images or steps that were not finite; the disk full.
    """
    config, processes = run.settings, run.processes
    # The main process makes the folder; what it finds out, bad news included, holds for all of them.
    folder, checkpoint = processes.on_main(lambda: open_run_folder(config.run, restarted=is_restart()))
    with folder.in_use() if processes.is_main else nullcontext():
        state = None
        if checkpoint is not None:
            state = open_state(checkpoint)
            changeable = [key for key in (*FREE_ON_RESUME, *free) if key not in bound]
            check_same_run(state.facts["config"], config, free=changeable)
            run.go_on_from(state)
        trainer = run.trainer(folder)
        trainer.hooks = hooks
        _begin(run, trainer, state)
        try:
            stopped_by = trainer.run()
        finally:
            if trainer.metrics is not None:
                trainer.metrics.close()
        run.count_unreadable()
        logger.info("%s", run.unreadable.summary())
        if stopped_by is None:
            run.write_weights(folder, trainer.average)
            finish(folder, trainer)
        return stopped_by


def _begin(run: Objective[Any], trainer: Trainer[Any], state: TrainingState | None) -> None:
    """Bring back the state to go on from, describe the run in its folder and open its log."""
    config, processes, folder = run.settings, run.processes, trainer.folder
    if state is not None:
        trainer.load(state)
        logger.info("continuing from step %d of %d (%s)", trainer.step, run.num_steps, state.path)
    else:
        logger.info(
            "%d images, %d steps of %d, %s on %s, writing to %s",
            *(run.num_samples, run.num_steps, config.train.batch_size, config.train.precision),
            *(processes.device, folder.root),
        )
    if not processes.is_main:
        return
    folder.write_description(to_yaml(config.resolved()))
    if state is not None:
        _bring_metrics(state.path, folder)
    trainer.metrics = MetricsLog(
        folder.metrics,
        last_step=trainer.step,
        tensorboard=folder.tensorboard if config.log.tensorboard else None,
        wandb=config.log.wandb,
        config=to_dict(config.resolved()),
    )


def _bring_metrics(checkpoint: Path, folder: RunFolder) -> None:
    """When a run goes on in another folder, its lines come along."""
    origin = checkpoint.parent.parent / "metrics.jsonl"
    if not folder.metrics.exists() and origin.is_file():
        folder.metrics.write_text(origin.read_text(encoding="utf-8"), encoding="utf-8")


def check_same_run(before: Mapping[str, Any], config: RunSettings, *, free: Sequence[str]) -> None:
    """Raises ConfigError where a key that changes the losses differs from the checkpoint's."""
    # Read back through the schema, so that a key added since the checkpoint was written stands at its default.
    now, then = flatten(to_dict(config.resolved())), flatten(to_dict(build_config(type(config), before).resolved()))
    changed = [
        f"{key} was {then.get(key)}, is {now.get(key)}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not key.startswith(tuple(free))
    ]
    if changed:
        raise ConfigError(
            f"this is not a continuation of the same run: {'; '.join(changed)}. Give the same values, or start a new "
            "run in another run.dir"
        )
