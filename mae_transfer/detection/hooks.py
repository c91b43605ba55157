"""What happens around the steps of a training, as Detectron2's hooks: records, checkpoints, evaluation, stops."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.engine.metrics import MetricsLog, read_metrics
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import EXIT_PREEMPTED, RunFailed

logger = logging.getLogger(__name__)


class FollowSchedule(HookBase):
    """Every learning rate is its value at the beginning times the schedule's factor: no state that could be wrong.

    Args:
        optimizer: fresh; its learning rates are those that the schedule multiplies.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[float], float], max_iter: int) -> None:
        self._optimizer = optimizer
        self._base = [group["lr"] for group in optimizer.param_groups]
        self._factor = factor
        self._max_iter = max_iter

    def before_step(self) -> None:
        factor = self._factor(self.trainer.iter / self._max_iter)
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor
        self.trainer.storage.put_scalar("lr", factor * max(self._base), smoothing_hint=False)


class RecordMetrics(HookBase):
    """``metrics.json``: a line an iteration with whatever was put into the storage for it, in Detectron2's format.

    Detectron2's own writer repeats the iterations that a resumed run does again, and keeps medians of a window that
    starts anew on every resume. Here an iteration has one line whatever happens, with its own values. An evaluation
    stands in the line of the first iteration that starts from the evaluated weights, the last one in a line of its own.

    Args:
        start: the iteration the run starts from. Lines from there on belong to work that was lost; they are removed.
        period: iterations between writes to the disk.
    """

    def __init__(self, path: Path, *, start: int, period: int) -> None:
        self._log = MetricsLog(path, key="iteration", last_step=start - 1)
        self._period = period
        self._written = start - 1

    def after_step(self) -> None:
        self._write()
        if (self.trainer.iter + 1) % self._period == 0:
            self.flush()

    def after_train(self) -> None:
        """The last evaluation, or what is known of an iteration that failed."""
        try:
            self._write()
            self.flush()
        finally:
            self._log.close()

    def flush(self) -> None:
        """To the disk itself, before a checkpoint that implies these lines.

        Raises:
            RunFailed: the disk is full.
        """
        with _a_full_disk_fails_the_run():
            self._log.flush()

    def _write(self) -> None:
        iteration = self.trainer.storage.iter
        if iteration <= self._written:
            return
        record: dict[str, float] = {}
        for name, history in sorted(self.trainer.storage.histories().items()):
            values = []
            for value, at in reversed(history.values()):
                if at != iteration:
                    break
                values.append(value)
            if values:
                record[name] = statistics.fmean(values)  # the model counts once in every accumulation round
        if record:
            with _a_full_disk_fails_the_run():
                self._log.write({"iteration": iteration, **record})
            self._written = iteration


@contextmanager
def _a_full_disk_fails_the_run() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write metrics.json: {error}; --resume goes on from the last checkpoint") from error


class SaveCheckpoints(HookBase):
    """``model_0000099.pth`` every ``period`` iterations, the newest ``keep`` of them, and ``model_final.pth``.

    Also after SIGTERM or SIGUSR1: finish the step, save, and leave with the status that says so.

    Args:
        before_save: called before a checkpoint is written.
    """

    def __init__(
        self,
        checkpointer: StrictCheckpointer,
        stop: StopRequest,
        *,
        period: int,
        keep: int,
        before_save: Callable[[], None],
    ) -> None:
        self._checkpointer = checkpointer
        self._stop = stop
        self._period = period
        self._keep = keep
        self._before_save = before_save

    def after_step(self) -> None:
        iteration = self.trainer.iter
        done = iteration + 1 == self.trainer.max_iter
        stopping = any(comm.all_gather(self._stop.received is not None))
        if (iteration + 1) % self._period == 0 or (stopping and not done):
            self._save(f"model_{iteration:07d}")
        if done:
            self._save("model_final")
        if stopping:
            comm.synchronize()  # the first process to leave has the others ended
            raise SystemExit(EXIT_PREEMPTED)

    def _save(self, name: str) -> None:
        self._before_save()
        self._checkpointer.save(name, iteration=self.trainer.iter)
        self._checkpointer.prune(keep=self._keep)


class Evaluate(HookBase):
    """Evaluation of the weights after every ``period`` iterations and at the end.

    It runs before an iteration rather than after one, so that a run killed while it evaluates does so when it goes on.

    Args:
        run: from the number of iterations done, numbers by name; empty in all processes but the first.
    """

    def __init__(self, run: Callable[[int], Mapping[str, float]], *, period: int) -> None:
        self._run = run
        self._period = period

    def before_step(self) -> None:
        done = self.trainer.iter
        if self._period and done and done % self._period == 0:
            self._evaluate(done)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not after a training that failed or was stopped
            self._evaluate(self.trainer.max_iter)

    def _evaluate(self, done: int) -> None:
        scores = self._run(done)
        self.trainer.storage.put_scalars(cur_iter=done, smoothing_hint=False, **scores)
        comm.synchronize()


class KeepBest:
    """``model_best.pth``: the weights that scored highest, without the state to go on from.

    Args:
        metric: such as "segm/AP".
        metrics_file: of the run so far: a resumed run remembers what it reached.
    """

    def __init__(self, checkpointer: StrictCheckpointer, metric: str, metrics_file: Path) -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        lines = read_metrics(metrics_file) if metrics_file.is_file() else []
        self._best = max((line[metric] for line in lines if line.get(metric) is not None), default=-math.inf)

    def consider(self, scores: Mapping[str, float], done: int) -> None:
        """Save what the model holds after ``done`` iterations if ``scores`` beat all before."""
        if scores and self._metric not in scores:
            logger.warning("The validation data has nothing to compute %s from; no model_best.pth", self._metric)
        score = scores.get(self._metric, -math.inf)
        if score > self._best:
            self._best = score
            self._checkpointer.save_weights("model_best", iteration=done - 1, **{self._metric: score})
            logger.info("%s %.2f is the best so far: model_best.pth", self._metric, score)


class StopOnDivergence(HookBase):
    """Ends a run whose loss has left for good, long before it would be noticed.

    A hard batch is no divergence, and in data with many empty images losses are of two sizes: the last ``SUSTAINED``
    must all exceed ``factor`` times what nine tenths of those before them stay below.
    """

    WINDOW = 100
    SUSTAINED = 10
    _NEEDED = 20  # losses that say what is usual

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=self.WINDOW + self.SUSTAINED)

    def after_step(self) -> None:
        self._losses.append(self.trainer.storage.history("total_loss").latest())
        if len(self._losses) < self._NEEDED + self.SUSTAINED:
            return
        losses = list(self._losses)
        before, last = losses[: -self.SUSTAINED], losses[-self.SUSTAINED :]
        usual = statistics.quantiles(before, n=10)[-1]
        if min(last) > self._factor * usual:
            raise RunFailed(
                f"the loss has diverged: the last {self.SUSTAINED} iterations, up to {self.trainer.iter}, lie at "
                f"{min(last):.3g} and above, more than {self._factor:g} times the {usual:.3g} before. Start again, "
                "or resume from an earlier checkpoint, with a lower optimizer.lr, a longer schedule.warmup_iters or "
                "train.clip_norm=1; train.divergence_factor=0 turns this check off"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._losses.extend(state_dict["losses"])
