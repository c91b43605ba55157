"""Which samples make up step t: a pure function of (seed, t), cut up among processes and accumulation rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mae_transfer.data.draws import permutation
from mae_transfer.errors import ConfigError


@dataclass(frozen=True, order=True)
class SampleKey:
    """A sample at its place in the run: ``index`` of the image in its source, seen in ``epoch``."""

    epoch: int
    index: int


class StepSampler:
    """Steps of ``batch_size`` samples over an endless chain of shuffled epochs.

    A step that reaches the end of an epoch goes on with the first samples of the next, so no image is left out and
    every step is full, also when the batch is larger than the data. Iterating yields micro-batches for one process:
    per step, ``accumulate`` lists of ``batch_size / (world_size * accumulate)`` keys, ready to be the
    ``batch_sampler`` of a DataLoader. Across processes and rounds they put together the same global batch.

    Raises:
        ConfigError: the batch does not divide among processes and rounds, or there are no samples.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        stop_step: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_samples < 1:
            raise ConfigError("there are no samples to draw from")
        if batch_size % (accumulate * world_size):
            raise ConfigError(
                f"train.batch_size={batch_size} (global) does not divide into {world_size} process(es) x "
                f"train.accumulate={accumulate}; use a multiple of {accumulate * world_size}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self._orders: dict[int, np.ndarray] = {}

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.accumulate * self.world_size)

    def global_batch(self, step: int) -> list[SampleKey]:
        """The samples of step ``step`` (0-based), in order."""
        keys = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, self.num_samples)
            keys.append(SampleKey(epoch, int(self._order(epoch)[place])))
        return keys

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = permutation(seed=self.seed, epoch=epoch, length=self.num_samples)
        return self._orders[epoch]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        size = self.micro_batch_size
        for step in range(self.start_step, self.stop_step):
            keys = self.global_batch(step)
            for round_ in range(self.accumulate):
                start = (round_ * self.world_size + self.rank) * size
                yield keys[start : start + size]

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.accumulate


def num_steps(*, epochs: float, num_samples: int, batch_size: int) -> int:
    """Steps that show every image ``epochs`` times: the last one may reach into the following epoch."""
    return math.ceil(epochs * num_samples / batch_size)
