"""Hooks of a run: replayable random numbers, leaving on bad losses and on signals, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_rank, is_main_process
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from mae_transfer.data.draws import Purpose
from mae_transfer.errors import EXIT_PREEMPTED, RunFailed
from mae_transfer.segmentation.dataset import draw_seed
from mae_transfer.segmentation.visualize import draw_segmentation, save_picture


@HOOKS.register_module()
class ReplayRandomness(Hook):
    """Start torch's random numbers (drop path, dropout) of iteration t at a function of (seed, t, process).

    A resumed run then drops what the uninterrupted one would have dropped.
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the iteration about to run; every process has a stream of its own."""
        torch.manual_seed(draw_seed(Purpose.STEP, seed=runner.seed, index=runner.iter, epoch=get_rank()))


@HOOKS.register_module()
class StopOnBadLoss(Hook):
    """End the run when the loss is no longer finite, rather than train on and save the result.

    Args:
        interval: iterations between looks (each waits for the device).
    """

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Look at the loss.

        Raises:
            RunFailed: it is infinite or not a number.
        """
        if outputs is None or not self.every_n_train_iters(runner, self.interval):
            return
        loss = float(outputs["loss"].detach())
        if not np.isfinite(loss):
            raise RunFailed(
                f"the loss is {loss} at iteration {runner.iter + 1}; lower train.lr, or try train.precision=fp32. "
                f"Checkpoints of before are in {runner.work_dir}"
            )


@HOOKS.register_module()
class SaveOnSignal(Hook):
    """Save and leave with status 75 when the runner's ``stop_request`` has noted SIGTERM or SIGUSR1.

    Several processes ask one another every ``interval`` iterations, so that all leave at the same one.
    """

    priority = "LOWEST"  # behind MMEngine's own checkpoint of the iteration

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Leave if asked to.

        Raises:
            SystemExit: with status 75, behind a checkpoint of this iteration.
        """
        asked = runner.stop_request is not None and runner.stop_request.received is not None
        if runner.world_size > 1:
            if not self.every_n_train_iters(runner, self.interval):
                return
            votes = torch.tensor(float(asked), device=get_device())
            all_reduce(votes, op="max")
            asked = bool(votes)
        if not asked:
            return
        name = f"iter_{runner.iter + 1}.pth"
        if is_main_process() and not (Path(runner.work_dir) / name).exists():
            runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
        runner.logger.info(f"asked to stop: saved {name}; give --resume to go on")
        raise SystemExit(EXIT_PREEMPTED)


@HOOKS.register_module()
class PredictionPictures(Hook):
    """Write image | ground truth | prediction of the first images of every validation or test.

    Args:
        folder: where to; NAME.png is overwritten by the next validation.
        count: number of images, evenly spread over the data set.
    """

    def __init__(self, folder: str, count: int = 8) -> None:
        self.folder, self.count = Path(folder), count

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Draw the batch if its turn has come."""
        self._draw(len(runner.val_dataloader), runner.val_dataloader.dataset.metainfo, batch_idx, outputs)

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Draw the batch if its turn has come."""
        self._draw(len(runner.test_dataloader), runner.test_dataloader.dataset.metainfo, batch_idx, outputs)

    def _draw(self, num_batches: int, meta: dict[str, Any], batch_idx: int, outputs: Sequence[Any] | None) -> None:
        if outputs is None or self.count == 0 or not is_main_process():
            return
        if (
            batch_idx % max(1, num_batches // self.count)
            or batch_idx // max(1, num_batches // self.count) >= self.count
        ):
            return
        for sample in outputs:
            truth = sample.gt_sem_seg.data.squeeze().cpu().numpy() if "gt_sem_seg" in sample else None
            picture = draw_segmentation(
                mmcv.imread(sample.img_path, channel_order="rgb"),
                sample.pred_sem_seg.data.squeeze().cpu().numpy(),
                meta["classes"],
                meta["palette"],
                truth,
            )
            save_picture(picture, self.folder / f"{Path(sample.img_path).stem}.png")
