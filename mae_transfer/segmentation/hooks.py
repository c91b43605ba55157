"""Hooks of a run: metrics, leaving on bad losses and on signals, and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, barrier, broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from mae_transfer.data.decode import decode_image
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.metrics import MetricsLog, read_metrics
from mae_transfer.errors import EXIT_PREEMPTED, CheckpointError, RunFailed
from mae_transfer.segmentation.processes import gather, release, share_of, share_statistics, whole
from mae_transfer.segmentation.visualize import draw_segmentation, save_picture

METRICS = "metrics.json"


@HOOKS.register_module()
class RecordMetrics(Hook):
    """``metrics.json`` and ``tensorboard/`` in the work dir: one of each, however often the run is started.

    Every iteration has a line ``{"step", "loss", "lr" …}`` and every validation a line ``{"step", "mIoU" …}``, of the
    numbers that MMEngine logs, unsmoothed; ``base_lr`` is the heads' rate, ``lr`` the first layer's. MMEngine's own
    ``*/vis_data/scalars.json`` begins anew at every start and repeats what a killed run had done behind its last
    checkpoint.

    A validation is recorded when its best checkpoint is written too. A run that goes on from an iteration whose
    validation is missing begins with it.

    Args:
        interval: iterations between writes to the disk; a checkpoint implies the lines up to it in any case.
    """

    priority = "LOW"  # behind the timer and MMEngine's log, before the checkpoint

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval
        self._log: MetricsLog | None = None
        self._scores: dict[str, float] = {}

    def before_train(self, runner: Any) -> None:
        """Open the files and remove what was recorded of iterations that are done again."""
        if is_main_process():
            folder = Path(runner.work_dir)
            self._log = MetricsLog(folder / METRICS, last_step=runner.iter, tensorboard=folder / "tensorboard")
            runner.on_exit.callback(self._log.close)

    def before_train_epoch(self, runner: Any) -> None:
        """Make up for a validation that the run was killed in."""
        loop, done = runner.train_loop, runner.iter
        if not done or runner.val_loop is None or (done % loop.val_interval and done < loop.max_iters):
            return
        validated = [is_main_process() and _was_validated(Path(runner.work_dir) / METRICS, done)]
        broadcast_object_list(validated)
        if not validated[0]:
            runner.val_loop.run()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Write the iteration's line."""
        if self._log is None:
            return
        scalars = runner.message_hub.log_scalars
        numbers = {
            name.removeprefix("train/"): history.current()
            for name, history in scalars.items()
            if name.startswith("train/")
        }
        with _a_full_disk_fails_the_run():
            self._log.write({"step": runner.iter + 1, **numbers})
        if self.every_n_train_iters(runner, self.interval):
            self._flush()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Keep the scores until the best checkpoint is written."""
        self._scores = {name: float(value) for name, value in (metrics or {}).items() if np.ndim(value) == 0}

    def after_val(self, runner: Any) -> None:
        """Write the validation's line."""
        if self._log is not None:
            with _a_full_disk_fails_the_run():
                self._log.write({"step": runner.iter, **self._scores})
            self._flush()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """To the disk, before a checkpoint that implies these lines."""
        self._flush()

    def after_train(self, runner: Any) -> None:
        """Nothing is left to be written later."""
        self._flush()

    def _flush(self) -> None:
        if self._log is not None:
            with _a_full_disk_fails_the_run():
                self._log.flush()


def _was_validated(path: Path, step: int) -> bool:
    return path.is_file() and any(line["step"] == step and "mIoU" in line for line in read_metrics(path))


@contextlib.contextmanager
def _a_full_disk_fails_the_run() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write {METRICS}: {error}; --resume goes on from the last checkpoint") from error


@HOOKS.register_module()
class ShareForValidation(Hook):
    """Before a validation by several processes: the same running means in all, and sharded weights whole."""

    def before_val(self, runner: Any) -> None:
        """Put together; all processes are here."""
        share_statistics(runner.model)
        gather(runner.model)

    def after_val(self, runner: Any) -> None:
        """Give up again what is others'."""
        release(runner.model)


@HOOKS.register_module()
class AverageWeights(Hook):
    """Validate, and keep as best, an exponential average over the weights of the steps (``engine.ema``).

    The average is the entry "ema" of a checkpoint, beside the weights that training goes on with; ``read_weights``
    gives what was validated. Running means of batch normalisation are those of the weights.

    Args:
        decay: of a long run; a young average forgets faster.
    """

    priority = "HIGH"  # before a validation gathers shards, and before a checkpoint

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._saved: dict[str, Any] | None = None
        self._average: WeightAverage | None = None
        self._swapped: AbstractContextManager[None] | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the average that the run goes on with.

        Raises:
            CheckpointError: it was trained without.
        """
        self._saved = checkpoint.get("ema")
        if self._saved is None:
            raise CheckpointError("the checkpoint holds no average of the weights: it was trained without train.ema")

    def before_train(self, runner: Any) -> None:
        """Begin with the weights, or where the run had been."""
        self._average = WeightAverage(runner.module, self.decay)
        if self._saved is not None:
            own = self._average.tensors
            self._average.load({name: share_of(tensor, own[name]) for name, tensor in self._saved.items()})
            self._saved = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Take in the step."""
        assert self._average is not None
        self._average.update(runner.iter + 1)

    def before_val(self, runner: Any) -> None:
        """The model computes with the average."""
        if self._average is not None:
            self._swapped = self._average.in_place()
            self._swapped.__enter__()

    def after_val(self, runner: Any) -> None:
        """Go on with the weights."""
        if self._swapped is not None:
            self._swapped.__exit__(None, None, None)
            self._swapped = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the average; a checkpoint to go on from that is written in a validation gets the weights themselves."""
        if self._average is None or "optimizer" not in checkpoint:
            return
        kept = whole(self._average.tensors)  # in a validation, these are the weights
        used = {name: checkpoint["state_dict"][name] for name in kept}
        swapped = self._swapped is not None
        checkpoint["ema"] = used if swapped else kept
        checkpoint["state_dict"].update(kept if swapped else used)


@HOOKS.register_module()
class StopOnBadLoss(Hook):
    """End the run when the loss is no longer finite, before a checkpoint of it is written.

    MMEngine has read the loss from the device for its own log by then: looking at every iteration costs nothing.
    """

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Look at the loss.

        Raises:
            RunFailed: it is infinite or not a number.
        """
        if outputs is None:
            return
        loss = float(outputs["loss"].detach())
        if not np.isfinite(loss):
            raise RunFailed(
                f"the loss is {loss} at iteration {runner.iter + 1}; lower train.lr, or try train.precision=fp32 or "
                f"train.clip_grad=1. Checkpoints of before are in {runner.work_dir}"
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
        saved = [(Path(runner.work_dir) / name).exists()]
        broadcast_object_list(saved)
        if not saved[0]:
            runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
        runner.logger.info(f"asked to stop: saved {name}; give --resume to go on")
        barrier()  # the first process to leave has the others ended
        raise SystemExit(EXIT_PREEMPTED)


@HOOKS.register_module()
class PredictionPictures(Hook):
    """Write image | ground truth | prediction of the first images of every validation or test.

    Args:
        folder: where to; NAME.png is overwritten by the next validation.
        count: number of images, evenly spread over the data set (of the main process's share); None for all.
    """

    def __init__(self, folder: str, count: int | None = 8) -> None:
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
        if outputs is None or not self._is_drawn(batch_idx, num_batches):
            return
        for sample in outputs:
            truth = sample.gt_sem_seg.data.squeeze().cpu().numpy() if "gt_sem_seg" in sample else None
            picture = draw_segmentation(
                np.asarray(decode_image(sample.img_path)),
                sample.pred_sem_seg.data.squeeze().cpu().numpy(),
                meta["classes"],
                meta["palette"],
                truth,
            )
            save_picture(picture, self.folder / f"{Path(sample.img_path).stem}.png")

    def _is_drawn(self, batch_idx: int, num_batches: int) -> bool:
        if self.count is None:
            return True
        if self.count == 0 or not is_main_process():
            return False
        every = max(1, num_batches // self.count)
        return batch_idx % every == 0 and batch_idx // every < self.count
