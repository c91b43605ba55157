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
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_transfer.engine.checkpoints import (
    CheckpointConfig,
    CheckpointWriter,
    TrainingState,
    latest_checkpoint,
)
from mae_transfer.engine.distribution import Agreement, Processes
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.hardware import memory_in_use
from mae_transfer.engine.metrics import MetricsLog
from mae_transfer.engine.parallel import STRATEGIES, gradient_exchange
from mae_transfer.engine.precision import PRECISIONS, Precision
from mae_transfer.engine.progress import Progress
from mae_transfer.engine.randomness import seed_step
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.signals import StopRequest
from mae_transfer.engine.state import training_tensors
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
    distributed: str = "ddp"  # how torchrun's processes share the work: ddp, or fsdp2 for models too large for it
    compile: bool = False  # each transformer block by torch.compile
    tf32: bool = False  # fp32 matrix products of a GPU in TF32: faster, with 10 bits of mantissa
    ema: float | None = None  # decay of an exponential moving average of the weights; null for none
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
        if self.distributed not in STRATEGIES:
            raise ConfigError(f"train.distributed={self.distributed}; use one of {', '.join(STRATEGIES)}")
        if self.distributed == "fsdp2" and self.precision == "fp16":
            raise ConfigError(
                "train.distributed=fsdp2 and train.precision=fp16 do not go together: each process would decide on the "
                "loss scale from its own shard. Use train.precision=bf16, or train.distributed=ddp"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"train.ema={self.ema} must lie between 0 and 1, such as 0.9999; null turns it off")
        if self.max_skipped < 0:
            raise ConfigError(f"train.max_skipped={self.max_skipped} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Something done every ``every_steps`` steps and after the last: evaluation, pictures.

    ``run`` gets the number of steps done and returns numbers for that step's line of metrics. The model is in
    evaluation mode meanwhile. Every process calls it, as a sharded model computes only together: each must make the
    same number of forward passes, and the main one alone writes files.
    """

    every_steps: int
    run: Callable[[int], Mapping[str, float]]


class Trainer(Generic[BatchT]):
    """Trains ``model`` for ``num_steps`` optimiser steps.

    Args:
        model: what is trained and saved, sharded or not.
        module: what is called, ``model`` or its wrapper (``parallel.parallelise``).
        loss: the mean loss of a micro-batch, from ``module`` and a batch of ``batches``.
        batches: from a step, an endless or long enough iterator of micro-batches, ``accumulate`` a step.
        keep_inputs: called with (step, folder) when a step's loss or gradients were not finite, on every process:
            saves what went in.
        before_save: called on every process before a checkpoint is written: what they have to agree on now and then.
        num_samples: of an epoch.
        seed: with the step, the round and the process it seeds whatever the model itself draws (drop path).
        sample_flops: floating-point operations of one sample's training, for the model FLOP utilisation.
        peak_flops: a second's worth of them at most, of all processes together.
        facts: further entries for the checkpoint, such as the config; JSON values.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        loss: Callable[[nn.Module, BatchT], Tensor],
        batches: Callable[[int], Iterator[BatchT]],
        keep_inputs: Callable[[int, RunFolder], None],
        before_save: Callable[[], None] = lambda: None,
        num_steps: int,
        num_samples: int,
        train: TrainConfig,
        precision: Precision,
        checkpoint: CheckpointConfig,
        log_every_steps: int,
        clip_grad: float | None,
        processes: Processes,
        folder: RunFolder,
        seed: int = 0,
        sample_flops: float | None = None,
        peak_flops: float | None = None,
        metrics: MetricsLog | None = None,
        hooks: Sequence[Hook] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.module = module
        self.optimizer = optimizer
        self.schedule = schedule
        self.loss = loss
        self.batches = batches
        self.keep_inputs = keep_inputs
        self.before_save = before_save
        self.num_steps = num_steps
        self.num_samples = num_samples
        self.train = train
        self.checkpoint = checkpoint
        self.log_every_steps = log_every_steps
        self.clip_grad = clip_grad
        self.processes = processes
        self.folder = folder
        self.seed = seed
        self.sample_flops = sample_flops
        self.peak_flops = peak_flops
        self.metrics = metrics
        self.hooks = hooks
        self.facts = dict(facts or {})
        self.precision = precision
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.average = WeightAverage(model, train.ema) if train.ema is not None else None
        self.step = 0  # optimiser steps done
        self.skipped = 0
        self.progress: Progress | None = None
        self._writer = CheckpointWriter(folder.checkpoints, keep=checkpoint.keep, processes=processes)
        self._agreement = Agreement(processes)
        self._pending: list[tuple[int, float, Tensor]] = []
        self._timer = time.perf_counter()
        self._waited = 0.0  # seconds since the timer spent waiting for batches

    def run(self) -> str | None:
        """Train to the end, or to a stop signal, whose name is returned after the state was saved.

        Raises:
            RunFailed: too many steps whose loss or gradients were not finite; a checkpoint that cannot be written.
        """
        self.progress = Progress(num_steps=self.num_steps, first_step=self.step, show=self.processes.is_main)
        self.model.train()
        batches = self.batches(self.step)
        stopped = False
        with StopRequest() as stop, closing(self.progress), closing(self._writer):
            self._restart_timer()
            while self.step < self.num_steps and not stopped:
                self._train_step(batches)
                stopped = self._after_step(stop)
            self._agreement.finish()
            self._writer.finish()
            return (stop.received or "a signal to another process") if stopped else None

    def _after_step(self, stop: StopRequest) -> bool:
        """Whatever is due after a step. True: asked to stop before the end, and the state is saved."""
        writer = self._writer
        agreed = self._agreement.exchange([bool(stop.received), writer.failed, -writer.completed])
        stopping = False
        if agreed is not None:
            stopping, failed, completed = bool(agreed[0]), bool(agreed[1]), -agreed[2]
            if failed:
                self._agreement.finish()
                writer.raise_failure()
            writer.seal(completed)
        done = self.step == self.num_steps
        due = [hook for hook in self.hooks if done or self.step % hook.every_steps == 0]
        save = done or stopping or self.step % self.checkpoint.every_steps == 0
        if save or due or self.step % self.log_every_steps == 0:
            self._flush(self._run_hooks(due) if due else {})
        if save:
            self.save()
        return stopping and not done

    def timed_steps(self, count: int) -> list[tuple[float, float]]:
        """Seconds of each of ``count`` real steps, and how many of them were spent waiting for batches; nothing is
        written: what a dry run measures."""
        self.model.train()
        batches = self.batches(self.step)
        seconds = []
        for _ in range(count):
            self._restart_timer()
            self._train_step(batches)
            self._pending.pop()[2].tolist()  # waits for the device
            seconds.append((time.perf_counter() - self._timer, self._waited))
        return seconds

    def _train_step(self, batches: Iterator[BatchT]) -> None:
        rate = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        total: Tensor | None = None
        rounds = self.train.accumulate
        for round_ in range(rounds):
            before = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - before
            part = round_ * self.processes.world_size + self.processes.rank
            seed_step(seed=self.seed, step=self.step, part=part, device=self.processes.device)
            with gradient_exchange(self.module, last=round_ == rounds - 1):
                with self.precision.autocast():
                    loss = self.loss(self.module, batch) / rounds
                self.precision.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        norm = self._optimizer_step(total)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self._pending.append((self.step, rate, torch.stack([total.float(), norm.float()])))

    def _optimizer_step(self, loss: Tensor) -> Tensor:
        """Step unless something is not finite, decided on the device, without waiting for it. Returns the norm."""
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # the shards' norms put together, by all processes
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
        before = time.perf_counter()
        self.model.eval()
        with torch.no_grad():
            for hook in due:
                results.update(hook.run(self.step))
        self.model.train()
        # Pictures and evaluation are not training: they do not count in images per second.
        self._timer += time.perf_counter() - before
        return results

    def _flush(self, extra: Mapping[str, float]) -> None:
        """Read the pending losses from the device, check them, and write a line for each step."""
        values = torch.stack([pair for *_, pair in self._pending])  # (steps, 2): loss, gradient norm
        values[:, 0] = self.processes.mean(values[:, 0].contiguous())
        rows = values.tolist()
        seconds = max(time.perf_counter() - self._timer, 1e-9)
        common = self._rates(len(rows), seconds)
        pending, self._pending = self._pending, []
        bad, records = [], []
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
                **common,
                "time": time.time(),
            }
            if step == self.step:
                record.update(extra)
            records.append(record)
        self._write(records)
        if self.progress is not None:
            self.progress.update(
                self.step,
                loss=rows[-1][0],
                lr=pending[-1][1],
                seconds=seconds,
                images_per_second=common["images_per_second"],
                mfu=common.get("mfu"),
                memory_bytes=round(common["memory_gib"] * 2**30),
                data_wait=common["data_wait"],
            )
        self._handle_nonfinite(bad)
        self._restart_timer()

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self.metrics is None:
            return
        try:
            for record in records:
                self.metrics.write(record)
            self.metrics.flush()
        except OSError as error:
            newest = latest_checkpoint(self.folder.checkpoints)
            raise RunFailed(
                f"cannot write {self.folder.metrics}: {error}; the last whole checkpoint is {newest}"
            ) from error

    def _rates(self, steps: int, seconds: float) -> dict[str, float]:
        """What the last ``steps`` steps cost, as it stands in their lines of metrics."""
        speed = steps * self.train.batch_size / seconds
        rates = {"images_per_second": speed, "data_wait": min(1.0, self._waited / seconds)}
        if self.sample_flops is not None and self.peak_flops:
            rates["mfu"] = speed * self.sample_flops / self.peak_flops
        rates["memory_gib"] = memory_in_use(self.processes.device) / 2**30
        return rates

    def _restart_timer(self) -> None:
        self._timer = time.perf_counter()
        self._waited = 0.0

    def _handle_nonfinite(self, bad: Sequence[int]) -> None:
        for step in bad:
            self.skipped += 1
            self.keep_inputs(step, self.folder)
            if self.processes.is_main:
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
        """Write the training state; every process calls it."""
        facts = {
            **self.facts,
            "step": self.step,
            "skipped": self.skipped,
            "num_samples": self.num_samples,
            "scaler": self.precision.scaler.state_dict(),
        }
        self._agreement.finish()
        self.before_save()
        self._writer.save(facts, training_tensors(self.model, self.optimizer, self.average))
        self._restart_timer()

    def load(self, state: TrainingState) -> None:
        """Go on from a checkpoint, of one process or of several; every process calls it.

        Raises:
            ConfigError: it was written with another number of images: samples would not be the same ones.
            CheckpointError: unreadable, or of another model.
        """
        facts = state.facts
        if facts["num_samples"] != self.num_samples:
            raise ConfigError(
                f"the checkpoint was trained on {facts['num_samples']} images an epoch and the training data now give "
                f"{self.num_samples}; restore the data, or start a new run"
            )
        if facts["step"] > self.num_steps:
            raise ConfigError(f"the checkpoint is at step {facts['step']}, past this run's end at {self.num_steps}")
        state.restore(
            model=self.model,
            optimizer=self.optimizer,
            average=self.average,
            alone=not self.processes.is_distributed,
        )
        self.precision.scaler.load_state_dict(facts["scaler"])
        self.step = facts["step"]
        self.skipped = facts["skipped"]
