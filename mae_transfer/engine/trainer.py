"""The training loop: accumulate, guard, step, record, save. What is trained on what is handed in."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_transfer.engine.checkpoints import CheckpointConfig, save_checkpoint
from mae_transfer.engine.distribution import Processes, no_sync, unwrap
from mae_transfer.engine.metrics import MetricsLog
from mae_transfer.engine.precision import PRECISIONS, Precision
from mae_transfer.engine.progress import Progress
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import ConfigError, RunFailed

logger = logging.getLogger(__name__)
BatchT = TypeVar("BatchT")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and arithmetic of a run."""

    epochs: float | None = None  # either this …
    steps: int | None = None  # … or this
    batch_size: int = 4096  # global: over all processes and accumulation rounds
    accumulate: int = 1
    precision: str = "bf16"
    device: str = "auto"
    distributed: str = "ddp"
    compile: bool = False
    max_skipped: int = 10  # steps left out because loss or gradients were not finite, before the run gives up

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise ConfigError("train.epochs and train.steps are both given; give one of them")
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ConfigError(f"train.epochs={self.epochs} must be positive")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"train.steps={self.steps} must be at least 1")
        if self.batch_size < 1 or self.accumulate < 1:
            raise ConfigError(
                f"train.batch_size={self.batch_size} and train.accumulate={self.accumulate} must be at least 1"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"train.precision={self.precision}; use one of {', '.join(PRECISIONS)}")
        if self.distributed == "fsdp2":
            raise ConfigError("train.distributed=fsdp2 is not available yet; use train.distributed=ddp")
        if self.distributed != "ddp":
            raise ConfigError(f"train.distributed={self.distributed}; use ddp")
        if self.max_skipped < 0:
            raise ConfigError(f"train.max_skipped={self.max_skipped} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Something done every ``every_steps`` steps and after the last: evaluation, pictures.

    ``run`` gets the number of steps done and returns numbers for that step's line of metrics. The model is in
    evaluation mode meanwhile. Only the main process calls it.
    """

    every_steps: int
    run: Callable[[int], Mapping[str, float]]


class Trainer(Generic[BatchT]):
    """Trains ``model`` for ``num_steps`` optimiser steps.

    Args:
        loss: the mean loss of a micro-batch, from the (possibly wrapped) model and a batch of ``batches``.
        batches: from a step, an endless or long enough iterator of micro-batches, ``accumulate`` a step.
        keep_inputs: called with (step, folder) when a step's loss or gradients were not finite: saves what went in.
        state: further entries for the checkpoint, such as the config.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        loss: Callable[[nn.Module, BatchT], Tensor],
        batches: Callable[[int], Iterator[BatchT]],
        keep_inputs: Callable[[int, RunFolder], None],
        num_steps: int,
        num_samples: int,
        train: TrainConfig,
        precision: Precision,
        checkpoint: CheckpointConfig,
        log_every_steps: int,
        clip_grad: float | None,
        processes: Processes,
        folder: RunFolder,
        metrics: MetricsLog | None = None,
        hooks: Sequence[Hook] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.loss = loss
        self.batches = batches
        self.keep_inputs = keep_inputs
        self.num_steps = num_steps
        self.num_samples = num_samples
        self.train = train
        self.checkpoint = checkpoint
        self.log_every_steps = log_every_steps
        self.clip_grad = clip_grad
        self.processes = processes
        self.folder = folder
        self.metrics = metrics
        self.hooks = hooks
        self.extra_state = dict(state or {})
        self.precision = precision
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.step = 0  # optimiser steps done
        self.skipped = 0
        self.progress: Progress | None = None
        self._pending: list[tuple[int, float, Tensor]] = []
        self._timer = time.perf_counter()

    def run(self) -> str | None:
        """Train to the end, or to a stop signal, whose name is returned after the state was saved.

        Raises:
            RunFailed: too many steps whose loss or gradients were not finite.
        """
        self.progress = Progress(num_steps=self.num_steps, first_step=self.step, show=self.processes.is_main)
        wrapped = self._wrap()
        self.model.train()
        batches = self.batches(self.step)
        with StopRequest() as stop, closing(self.progress):
            self._timer = time.perf_counter()
            while self.step < self.num_steps:
                self._train_step(wrapped, batches)
                if self._after_step(stop):
                    return stop.received or "a signal to another process"
        return None

    def _after_step(self, stop: StopRequest) -> bool:
        """Whatever is due after a step. True: asked to stop, and the state is saved."""
        done = self.step == self.num_steps
        due = [hook for hook in self.hooks if done or self.step % hook.every_steps == 0]
        flush = done or bool(due) or self.step % self.log_every_steps == 0
        save = done or self.step % self.checkpoint.every_steps == 0
        # Alone, a signal is seen at once. Several processes agree on it where they exchange values anyway.
        stopping = (flush or not self.processes.is_distributed) and self.processes.any(bool(stop.received))
        if flush or save or stopping:
            self._flush(self._run_hooks(due) if due else {})
        if save or stopping:
            self.save()
        return stopping and not done

    def timed_steps(self, count: int) -> list[float]:
        """Seconds of each of ``count`` real steps, nothing written: what a dry run measures."""
        wrapped = self._wrap()
        self.model.train()
        batches = self.batches(self.step)
        seconds = []
        for _ in range(count):
            before = time.perf_counter()
            self._train_step(wrapped, batches)
            self._pending.pop()[2].tolist()  # waits for the device
            seconds.append(time.perf_counter() - before)
        return seconds

    def _wrap(self) -> nn.Module:
        model = self.processes.wrap(self.model)
        return torch.compile(model) if self.train.compile else model  # type: ignore[return-value]

    def _train_step(self, wrapped: nn.Module, batches: Iterator[BatchT]) -> None:
        rate = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: Tensor | None = None
        for round_ in range(self.train.accumulate):
            batch = next(batches)
            with no_sync(wrapped, last=round_ == self.train.accumulate - 1):
                with self.precision.autocast():
                    loss = self.loss(wrapped, batch) / self.train.accumulate
                self.precision.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        norm = self._optimizer_step(total)
        self.step += 1
        self._pending.append((self.step, rate, torch.stack([total.float(), norm.float()])))

    def _optimizer_step(self, loss: Tensor) -> Tensor:
        """Step unless something is not finite, decided on the device, without waiting for it. Returns the norm."""
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.clip_grad is not None:
            clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        if scaler.is_enabled():
            scaler.step(self.optimizer)
            scaler.update()
        else:
            # The fused kernel leaves parameters and moments alone where found_inf is 1: the hook that GradScaler uses.
            # Gradients are already averaged over processes, so that all of them see the same norm.
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _run_hooks(self, due: Sequence[Hook]) -> dict[str, float]:
        results: dict[str, float] = {}
        if self.processes.is_main:
            self.model.eval()
            with torch.inference_mode():
                before = time.perf_counter()
                for hook in due:
                    results.update(hook.run(self.step))
                # Pictures and evaluation are not training: they do not count in images per second.
                self._timer += time.perf_counter() - before
            self.model.train()
        self.processes.barrier()
        return results

    def _flush(self, extra: Mapping[str, float]) -> None:
        """Read the pending losses from the device, check them, and write a line for each step."""
        if not self._pending:
            return
        values = torch.stack([pair for *_, pair in self._pending])  # (steps, 2): loss, gradient norm
        values[:, 0] = self.processes.mean(values[:, 0].contiguous())
        rows = values.tolist()
        seconds = time.perf_counter() - self._timer
        speed = len(rows) * self.train.batch_size / max(seconds, 1e-9)
        pending, self._pending = self._pending, []
        bad = []
        for (step, rate, _), (loss, norm) in zip(pending, rows, strict=True):
            # fp16's loss scale makes gradients overflow as a matter of course; there only the loss itself counts.
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.precision.scaler.is_enabled()):
                bad.append(step)
            record = {
                "step": step,
                "epoch": step * self.train.batch_size / self.num_samples,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "images_per_second": speed,
                "time": time.time(),
            }
            if step == self.step:
                record.update(extra)
            if self.metrics is not None:
                self.metrics.write(record)
        if self.metrics is not None:
            self.metrics.flush()
        if self.progress is not None:
            self.progress.update(
                self.step, loss=rows[-1][0], lr=pending[-1][1], images_per_second=speed, seconds=seconds
            )
        self._handle_nonfinite(bad)
        self._timer = time.perf_counter()

    def _handle_nonfinite(self, bad: Sequence[int]) -> None:
        for step in bad:
            self.skipped += 1
            if self.processes.is_main:
                self.keep_inputs(step, self.folder)
                logger.warning(
                    "step %d: loss or gradients not finite, step left out (%d so far); its inputs are in %s",
                    *(step, self.skipped, self.folder.nonfinite),
                )
        if bad and self.skipped > self.train.max_skipped:
            raise RunFailed(
                f"{self.skipped} steps had a loss or gradients that were not finite (train.max_skipped="
                f"{self.train.max_skipped}), the last one step {bad[-1]}. What helps, in this order: a lower "
                "optim.base_lr or a longer optim.warmup_epochs; optim.clip_grad=1; train.precision=fp32. The inputs of "
                f"these steps are in {self.folder.nonfinite}, the last good state in {self.folder.checkpoints}"
            )

    def save(self) -> None:
        """Write the training state; every process calls it, the main one writes."""
        if self.processes.is_main:
            save_checkpoint(self.folder.checkpoints, self.state_dict(), keep=self.checkpoint.keep)
        self.processes.barrier()
        self._timer = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.extra_state,
            "step": self.step,
            "skipped": self.skipped,
            "num_samples": self.num_samples,
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "random": {"torch": torch.get_rng_state()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: it was written with another number of images: samples would not be the same ones.
        """
        if state["num_samples"] != self.num_samples:
            raise ConfigError(
                f"the checkpoint was trained on {state['num_samples']} images and data.path now has "
                f"{self.num_samples}; restore the data, or start a new run"
            )
        if state["step"] > self.num_steps:
            raise ConfigError(f"the checkpoint is at step {state['step']}, past this run's end at {self.num_steps}")
        unwrap(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["torch"])
        self.step = state["step"]
        self.skipped = state["skipped"]
