"""A pretraining run from its folder's opening to its last file."""

from __future__ import annotations

import logging

from mae_transfer.engine.distribution import Processes, is_restart
from mae_transfer.engine.run import carry_out
from mae_transfer.engine.run_folder import RunFolder, run_before
from pretrain.config import PretrainConfig
from pretrain.load import load_initial_weights
from pretrain.monitor import monitors
from pretrain.objective import PretrainRun

logger = logging.getLogger(__name__)


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
    # A run that goes on has its own weights, and the file may be gone.
    goes_on = processes.on_main(lambda: run_before(config.run, restarted=is_restart()) is not None)
    if config.init_checkpoint is not None and not goes_on:
        logger.info("%s", load_initial_weights(run.model, config.init_checkpoint))
    return carry_out(run, monitors(run, RunFolder(config.run.dir)), free=("probe.", "data.path", "data.val_path"))
