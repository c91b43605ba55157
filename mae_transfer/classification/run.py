"""A classification run from its folder's opening to its last file."""

from __future__ import annotations

import time
from contextlib import nullcontext

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.evaluate import Evaluation
from mae_transfer.classification.knn import run_knn
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.classification.report import write_report
from mae_transfer.engine.config import to_dict, to_yaml
from mae_transfer.engine.distribution import Processes, is_restart
from mae_transfer.engine.metrics import MetricsLog, require_wandb
from mae_transfer.engine.run import carry_out
from mae_transfer.engine.run_folder import open_run_folder

# Where images lie and how they are tested does not change what is learned.
_FREE_ON_RESUME = ("data.train", "data.val", "data.eval_crop", "data.class_map", "knn.")


def classify(config: ClassificationConfig, processes: Processes) -> str | None:
    """Run, or continue, one of the protocols to its end.

    Returns:
        None, or the name of the signal that stopped it (the state is saved).

    Raises:
        UserError: anything wrong with config or data, before training starts.
        RunFailed: too many unreadable images or steps that were not finite; the disk full.
    """
    if config.log.wandb is not None:
        require_wandb()
    # First, as a mistake in config or data leaves no folder behind.
    run = ClassificationRun(config, processes)
    if config.protocol == "knn":
        find_neighbours(run)
        return None
    evaluation = Evaluation(run)
    return carry_out(
        run,
        [evaluation.hook],
        free=_FREE_ON_RESUME,
        # Who is mixed with whom, and whose statistics a probe takes, depends on the micro-batch.
        bound=["train.accumulate"] if run.config.augmentation.mixes or not run.config.trains_encoder else [],
        finish=lambda folder, trainer: write_report(run, folder, evaluation.latest),
    )


def find_neighbours(run: ClassificationRun) -> None:
    """Nearest neighbours, which train nothing: a run folder with one line of metrics and the report."""
    config, processes = run.config, run.processes
    folder, _ = processes.on_main(lambda: open_run_folder(config.run, restarted=is_restart()))
    with folder.in_use() if processes.is_main else nullcontext():
        numbers, predictions = run_knn(run)
        write_report(run, folder, predictions)
        if processes.is_main:
            folder.write_description(to_yaml(config))
            log = MetricsLog(
                folder.metrics, last_step=0, tensorboard=None, wandb=config.log.wandb, config=to_dict(config)
            )
            log.write({"step": 0, "epoch": 0.0, **numbers, "time": time.time()})
            log.close()
