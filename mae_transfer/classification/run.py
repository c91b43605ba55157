"""A classification run from its folder's opening to its last file."""

from __future__ import annotations

import logging
from typing import Any

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.evaluate import evaluation_hook
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.metrics import require_wandb
from mae_transfer.engine.run import carry_out
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.trainer import Trainer

logger = logging.getLogger(__name__)

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

    def finish(folder: RunFolder, trainer: Trainer[Any]) -> None:
        write_report(run, folder)

    return carry_out(run, [evaluation_hook(run)], free=_FREE_ON_RESUME, finish=finish)


def write_report(run: ClassificationRun, folder: RunFolder) -> None:
    pass
