"""Which samples make up step t: a pure function of (seed, t), cut up among processes and accumulation rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mae_transfer.data.draws import permutation
from mae_transfer.errors import ConfigError


@dataclass(frozen=True, order=True, slots=True)
class SampleKey:
    """A sample at its place in the run: ``index`` of the image in its source, seen in ``epoch``.

    ``view`` numbers the crops that are made of one decoded image.
    """

    epoch: int
    index: int
    view: int = 0


class StepSampler:
    """Steps of ``batch_size`` samples over an endless chain of shuffled epochs.

    A step that reaches the end of an epoch goes on with the first samples of the next, so no image is left out and
    every step is full, also when the batch is larger than the data. Iterating yields micro-batches for one process:
    per step, ``accumulate`` lists of ``batch_size / (world_size * accumulate)`` keys, ready to be the
    ``batch_sampler`` of a DataLoader. Across processes and rounds they put together the same global batch.

    With ``repeats`` a batch is of ``batch_size / repeats`` images, and each of them ``repeats`` times in a row, as so
    many views. An epoch is still every image once, hence ``num_samples * repeats`` samples long.

    Raises:
        ConfigError: the batch does not divide among processes, rounds and repeats, or there are no samples.
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
        repeats: int = 1,
    ) -> None:
        if num_samples < 1:
            raise ConfigError("there are no samples to draw from")
        unit = accumulate * world_size * repeats
        if batch_size % unit:
            below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
            nearest = f"{below} or {above}" if below else str(above)
            crops = f" x data.repeats={repeats}" if repeats > 1 else ""
            raise ConfigError(
                f"train.batch_size={batch_size} (global) does not divide into {world_size} process(es) x "
                f"train.accumulate={accumulate}{crops}; use a multiple of {unit}: {nearest}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.stop_step = stop_step
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self._orders: dict[int, np.ndarray] = {}

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.accumulate * self.world_size)

    def global_batch(self, step: int) -> list[SampleKey]:
        """The samples of step ``step`` (0-based), in order."""
        return self._keys(step, 0, self.batch_size)

    def _keys(self, step: int, start: int, stop: int) -> list[SampleKey]:
        """Samples ``start`` to ``stop`` of a step; both are multiples of ``repeats``."""
        keys = []
        first = step * self.batch_size
        for position in range((first + start) // self.repeats, (first + stop) // self.repeats):
            epoch, place = divmod(position, self.num_samples)
            index = int(self._order(epoch)[place])
            keys += [SampleKey(epoch, index, view) for view in range(self.repeats)]
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
            for round_ in range(self.accumulate):
                start = (round_ * self.world_size + self.rank) * size
                yield self._keys(step, start, start + size)

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.accumulate


def num_steps(*, epochs: float, num_samples: int, batch_size: int, repeats: int = 1) -> int:
    """Steps that decode every image ``epochs`` times: the last one may reach into the following epoch.

    With ``repeats`` crops of each decoded image an epoch is ``num_samples * repeats`` crops long.
    """
    return math.ceil(epochs * num_samples * repeats / batch_size)
