"""Exponential moving average of the weights, kept where the weights are, sharded if they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """``average += (1 - decay) * (weight - average)`` after every step, in place, on this process's own part.

    Interpolation is element by element, so the shards of the average are the averages of the shards: nothing is
    gathered. The decay of step t is ``min(decay, (1 + t) / (10 + t))``, so that a young average forgets the random
    initialisation (as in TensorFlow's ``ExponentialMovingAverage``).

    Args:
        model: whose trained parameters are averaged.
        decay: of a long run; 0.9999 halves the weight of a step after 6 931 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step`` (1-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = [_local(tensor) for tensor in self.tensors.values()]
        torch._foreach_lerp_(own, [_local(weight) for weight in self._weights.values()], 1 - decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the average of a checkpoint."""
        for name, own in self.tensors.items():
            own.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the average inside this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            own, average = _local(weight), _local(self.tensors[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
