"""The training loop: one iteration is one optimizer step, in however many parts its batch is computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_dist_info
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import LOOPS
from torch import Tensor

from mae_transfer.engine.parallel import gradient_exchange
from mae_transfer.engine.randomness import seed_step


@LOOPS.register_module()
class MAETrainLoop(IterBasedTrainLoop):
    """MMEngine's IterBasedTrainLoop with gradient accumulation inside an iteration, and draws that a restart repeats.

    The loader gives this process's share of a step's batch, and ``optim_wrapper.accumulate`` says in how many
    micro-batches it is computed; schedule, intervals and logs count steps.

    Dropout and drop path of a micro-batch are a function of (seed, iteration, part of the global batch). Samples are
    dealt out in turn, to processes and then to micro-batches, so a batch is dealt alike to two processes and to two
    micro-batches of one: such runs draw, and train, the same.
    """

    def run_iter(self, data_batch: Mapping[str, Sequence[Any]]) -> None:
        """A step on ``data_batch``: lists of samples by name."""
        runner = self.runner
        runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        rounds = getattr(runner.optim_wrapper, "accumulate", 1)
        rank, num_processes = get_dist_info()
        logged = []
        for number in range(rounds):
            part = number * num_processes + rank
            seed_step(seed=runner.seed, step=self._iter, part=part, device=torch.device(get_device()))
            micro = {name: samples[number::rounds] for name, samples in data_batch.items()}
            with gradient_exchange(runner.model, last=number == rounds - 1):
                logged.append(runner.model.train_step(micro, optim_wrapper=runner.optim_wrapper))
        outputs = _mean(logged)
        runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=outputs)
        self._iter += 1


def _mean(logged: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What the rounds of all processes have logged, averaged: every process logs, and judges, the whole step's."""
    names = list(logged[0])
    values = torch.stack([torch.stack([numbers[name].detach().float().mean() for name in names]) for numbers in logged])
    mean = values.mean(dim=0)
    all_reduce(mean, op="mean")
    return OrderedDict(zip(names, mean, strict=True))
