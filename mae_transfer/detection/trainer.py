"""Detectron2's trainer with a precision that works on CPU and GPU, and steps that are a function of (seed, step)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import nn

from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import EXIT_PREEMPTED, RunFailed


class Trainer(SimpleTrainer):
    """One loss, one optimizer; Detectron2's own mixed-precision trainer asserts a GPU.

    The random draws inside a step (which anchors and regions are sampled, which residual branches are dropped) are
    seeded anew in every step, so that a resumed run draws what the uninterrupted one would have drawn.

    Args:
        data_loader: its first batch is that of the iteration the run starts from.
        clip_norm: largest norm of the gradient; None for no clipping, as in the recipes.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        seed: int,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.precision = precision
        self.seed = seed
        self.clip_norm = clip_norm

    def run_step(self) -> None:
        assert self.model.training
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        # After the batch: a loader that is just starting draws a seed for its workers, a running one does not.
        draws = Draws(seed=self.seed, purpose=Purpose.STEP, epoch=self.iter, index=comm.get_rank())
        torch.manual_seed(int(draws.words(1)[0] >> 1))
        with self.precision.autocast():
            losses = self.model(batch)
        self.optimizer.zero_grad()
        scaler = self.precision.scaler
        scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        if self.clip_norm is not None:
            scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self._check_and_write(losses, data_time)
        scaler.step(self.optimizer)
        scaler.update()

    def _check_and_write(self, losses: dict[str, torch.Tensor], data_time: float) -> None:
        try:
            self.write_metrics(losses, data_time, self.iter)
        except FloatingPointError as error:
            raise RunFailed(
                f"the loss is no longer finite at iteration {self.iter}; resume from the last checkpoint with a lower "
                "optimizer.lr, or with train.clip_norm=1"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.precision.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.precision.scaler.load_state_dict(state_dict["scaler"])


class SaveOnSignal(HookBase):
    """After SIGTERM or SIGUSR1: finish the step, save, and leave with the status that says so."""

    def __init__(self, request: StopRequest, checkpointer: Any) -> None:
        self.request = request
        self.checkpointer = checkpointer

    def after_step(self) -> None:
        if any(comm.all_gather(self.request.received is not None)):
            self.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
            raise SystemExit(EXIT_PREEMPTED)
