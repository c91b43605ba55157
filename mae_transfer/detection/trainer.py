"""Detectron2's trainer with a precision that works on CPU and GPU, and steps that are a function of (seed, step)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.parallel import gradient_exchange
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.randomness import seed_step
from mae_transfer.errors import CheckpointError, ConfigError, RunFailed


class Trainer(SimpleTrainer):
    """One loss, one optimizer; Detectron2's own mixed-precision trainer asserts a GPU.

    The random draws inside a step (which anchors and regions are sampled, which residual branches are dropped) are
    seeded anew in every step, so that a resumed run draws what the uninterrupted one would have drawn.

    Args:
        model: what is called: the detector, or its DistributedDataParallel.
        data_loader: ``accumulate`` micro-batches an iteration; its first is that of the iteration the run starts from.
        accumulate: micro-batches whose gradients are averaged before a step.
        clip_norm: largest norm of the gradient; None for no clipping, as in the recipes.
        average: kept up to date and saved with the rest; None for none.
        facts: what a checkpoint must agree with to be gone on from, such as the number of images.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        seed: int,
        accumulate: int = 1,
        clip_norm: float | None = None,
        average: WeightAverage | None = None,
        facts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.precision = precision
        self.seed = seed
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.average = average
        self.facts = dict(facts or {})
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def run_step(self) -> None:
        assert self.model.training
        self.optimizer.zero_grad()
        rounds, waited = self.accumulate, 0.0
        total: dict[str, Tensor] = {}
        for round_ in range(rounds):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            waited += time.perf_counter() - start
            # After the batch: a loader that is just starting draws a seed for its workers, a running one does not.
            part = round_ * comm.get_world_size() + comm.get_rank()
            seed_step(seed=self.seed, step=self.iter, part=part, device=self.precision.device)
            with gradient_exchange(self.model, last=round_ == rounds - 1):
                with self.precision.autocast():
                    losses = self.model(batch)
                self.precision.scaler.scale(sum(losses.values()) / rounds).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0.0) + loss.detach().float() / rounds
        self.after_backward()
        norm = self._gradient_norm()
        self._record(total, norm, waited)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        if self.average is not None:
            self.average.update(self.iter + 1)

    def _gradient_norm(self) -> Tensor:
        """The norm of all gradients, over all processes the same; they are clipped where that is wanted."""
        self.precision.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.clip_norm is not None:
            clip_grads_with_norm_(self._parameters, self.clip_norm, norm)
        return norm

    def _record(self, losses: Mapping[str, Tensor], norm: Tensor, waited: float) -> None:
        """The step's mean losses over processes into the storage, with one wait for the device.

        Raises:
            RunFailed: something is not finite, in all processes alike, before the weights are touched.
        """
        values = torch.stack([*losses.values(), norm.float(), norm.new_tensor(waited, dtype=torch.float32)])
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
        *numbers, size, waited = values.tolist()
        self.storage.put_scalars(total_loss=sum(numbers), grad_norm=size, data_time=waited)
        self.storage.put_scalars(**dict(zip(losses, numbers, strict=True)))
        # fp16's loss scale makes gradients overflow as a matter of course; there only the loss itself counts.
        if math.isfinite(sum(numbers)) and (math.isfinite(size) or self.precision.scaler.is_enabled()):
            return
        what = "gradient" if math.isfinite(sum(numbers)) else "loss"
        raise RunFailed(
            f"the {what} is no longer finite at iteration {self.iter}; resume from the last checkpoint with a lower "
            "optimizer.lr, or with train.clip_norm=1"
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Inside this context the model computes with the average of its weights, if one is kept."""
        return nullcontext() if self.average is None else self.average.in_place()

    def after_train(self) -> None:
        # Gone on from its last iteration, Detectron2 would count one beyond the end.
        self.iter: int = min(self.iter, self.max_iter)
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "scaler": self.precision.scaler.state_dict(), "facts": self.facts}
        if self.average is not None:
            state["ema"] = self.average.tensors
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave.

        Raises:
            ConfigError: the checkpoint was trained on other data or in other steps: samples would not be the same.
            CheckpointError: it was trained with other parameters, or without the average that is wanted.
        """
        facts = state_dict.get("facts", {})
        for name, value in self.facts.items():
            if facts.get(name, value) != value:
                raise ConfigError(
                    f"the checkpoint was trained with {name}={facts[name]} and this run has {value}: it would not see "
                    "the same samples. Restore what it was, or start a new run in another train.output_dir"
                )
        average = state_dict.get("ema")
        if self.average is not None:
            if average is None or average.keys() != self.average.tensors.keys():
                raise CheckpointError(
                    "the checkpoint holds no average of this run's weights; train.ema and train.freeze_blocks must "
                    "stay what they were when the run began"
                )
            self.average.load(average)
        saved, own = state_dict["optimizer"], self.optimizer.state_dict()
        if [len(group["params"]) for group in saved["param_groups"]] != [len(g["params"]) for g in own["param_groups"]]:
            raise CheckpointError(
                "the checkpoint's optimizer has other parameters; optimizer.decay_rule and train.freeze_blocks must "
                "stay what they were when the run began"
            )
        # Learning rate, decay and so on are today's: a run that diverged is gone on with at a lower one.
        super().load_state_dict({**state_dict, "optimizer": {**saved, "param_groups": own["param_groups"]}})
        self.precision.scaler.load_state_dict(state_dict["scaler"])
