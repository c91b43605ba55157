"""Micro-batches of images by their keys, whatever is trained on them; images that cannot be read are replaced."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_transfer.data.decode import Picture
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.find import open_source
from mae_transfer.data.sampler import SampleKey, StepSampler
from mae_transfer.data.settings import ImagesConfig
from mae_transfer.data.source import CachedImages, Source
from mae_transfer.data.transforms import centre_box, cut, whole_range
from mae_transfer.engine.signals import ignore_stop_signals
from mae_transfer.errors import DataError, RunFailed

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REPLACEMENT_ATTEMPTS = 100


@dataclass(kw_only=True)
class Batch:
    """A micro-batch.

    Attributes:
        images: (N, C, H, W); uint8 for pictures, else the type of the data (see ``normalise``). In memory the channels
            come last, as decoders and resizing have them.
        unreadable: what could not be read, index -> reason.
    """

    images: Tensor
    unreadable: dict[int, str] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The batch with ``function`` of each of its tensors in their place."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        values = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def pin_memory(self) -> Self:
        return self.map(lambda tensor: tensor.pin_memory())


BatchT = TypeVar("BatchT", bound=Batch)
BatchT_co = TypeVar("BatchT_co", bound=Batch, covariant=True)


class KeyedBatches(Protocol[BatchT_co]):
    """A data set that makes whole micro-batches from their keys: the same keys give the same batch, anywhere."""

    def __len__(self) -> int: ...

    def __getitems__(self, keys: Sequence[SampleKey]) -> BatchT_co: ...


def open_images(data: ImagesConfig, roots: Sequence[Path]) -> Source:
    """The images at ``roots``, decoded once into memory if ``data.cache`` says so."""
    source = open_source(roots, channels=data.channels, floats=data.own_statistics, cache=data.scan_cache_folder)
    return cached(source, data)


def cached(source: Source, data: ImagesConfig) -> Source:
    """``source``, decoded once into memory if ``data.cache`` says so."""
    return CachedImages(source, limit_bytes=int(data.cache_gib * 2**30)) if data.cache == "ram" else source


def read_or_replace(
    source: Source, key: SampleKey, use: Callable[[Picture], T], *, seed: int, unreadable: dict[int, str]
) -> tuple[T, int]:
    """What ``use`` makes of the picture of ``key``, or of others drawn from its own stream until one can be read, and
    the index of the one that was: its label goes with it.

    What could not be read is added to ``unreadable``, index -> reason.

    Raises:
        RunFailed: nothing but unreadable images.
    """
    index = key.index
    draws: Draws | None = None
    for _ in range(_REPLACEMENT_ATTEMPTS):
        try:
            return use(source.picture(index)), index
        except DataError as error:
            unreadable[index] = str(error)
            if draws is None:
                draws = Draws(seed=seed, purpose=Purpose.REPLACEMENT, epoch=key.epoch, index=key.index)
            index = int(draws.words(1)[0] % np.uint64(len(source)))
    raise RunFailed(f"{_REPLACEMENT_ATTEMPTS} images in a row cannot be read; the last: {unreadable[index]}")


class ImageBatch:
    """Images (H, W, C) put one after the other where the batch will be: (N, C, H, W), channels last in memory.

    The type is that of the first image; where another comes, all become float32 values in 0..1 (see ``normalise``).
    """

    def __init__(self, count: int, *, size: tuple[int, int], channels: int) -> None:
        self.shape = (count, *size, channels)
        self._pixels: Tensor | None = None  # (N, H, W, C)
        self._filled = 0

    def add(self, image: Tensor) -> None:
        """An image of ``channels`` channels, or of one that stands for all."""
        if self._pixels is None:
            self._pixels = torch.empty(self.shape, dtype=image.dtype)
        elif self._pixels.dtype != image.dtype:
            self._pixels, image = _as_floats(self._pixels), _as_floats(image)
        self._pixels[self._filled].copy_(image)
        self._filled += 1

    @property
    def tensor(self) -> Tensor:
        assert self._pixels is not None and self._filled == len(self._pixels)
        return self._pixels.permute(0, 3, 1, 2)


def _as_floats(images: Tensor) -> Tensor:
    return images.float() / whole_range(images.dtype)


def to_batch(images: Sequence[np.ndarray | Tensor]) -> Tensor:
    """Images (H, W, C) as (N, C, H, W); C may be 1 in some of them, standing for all."""
    height, width = images[0].shape[:2]
    batch = ImageBatch(len(images), size=(height, width), channels=max(image.shape[2] for image in images))
    for image in images:
        batch.add(image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)))
    return batch.tensor


def fixed_images(
    source: Source, *, indices: Sequence[int], size: tuple[int, int], seed: int
) -> tuple[Tensor, dict[int, str]]:
    """Images for evaluation and pictures: the largest centred box of the aspect ratio of ``size`` (H, W).

    Returns:
        (N, C, H, W) as in ``MaskedBatch``, and what could not be read and was replaced, index -> reason.
    """
    unreadable: dict[int, str] = {}
    images = ImageBatch(len(indices), size=size, channels=source.channels)

    def centre(picture: Picture) -> Tensor:
        return cut(picture, [centre_box(picture, size=size)], size=size)[0]

    for index in indices:
        images.add(read_or_replace(source, SampleKey(0, index), centre, seed=seed, unreadable=unreadable)[0])
    return images.tensor, unreadable


class UnreadableCount:
    """Names each unreadable image once, and stops the run above a share of the data.

    Each process counts what it has seen itself; ``merge`` brings in what others have.

    Attributes:
        seen: the indices of unreadable images.
    """

    def __init__(self, *, num_samples: int, limit: float) -> None:
        self.num_samples = num_samples
        self.limit = limit
        self.seen: set[int] = set()

    def add(self, unreadable: Mapping[int, str]) -> None:
        """Raises RunFailed above the limit."""
        for index, reason in unreadable.items():
            if index not in self.seen:
                self.seen.add(index)
                logger.warning("%s; another image takes its place (%d unreadable so far)", reason, len(self.seen))
        self.check()

    def merge(self, *others: Iterable[int]) -> None:
        """Count the indices that other processes have seen, without a word: they have named them."""
        self.seen.update(*others)

    def check(self) -> None:
        """Raises RunFailed above the limit."""
        if len(self.seen) > self.limit * self.num_samples:
            raise RunFailed(
                f"{len(self.seen)} of {self.num_samples} images cannot be read, more than data.max_unreadable="
                f"{self.limit:g} allows; repair or remove the files named above, or raise data.max_unreadable"
            )

    def summary(self) -> str:
        """A line for the end of a run."""
        if not self.seen:
            return f"all of the {self.num_samples} images that were asked for could be read"
        share = len(self.seen) / self.num_samples
        return (
            f"{len(self.seen)} of {self.num_samples} images ({share:.1%}) could not be read and were replaced by others"
        )


def batch_stream(
    dataset: KeyedBatches[BatchT], sampler: StepSampler, *, workers: int, pin_memory: bool, count: UnreadableCount
) -> Iterator[BatchT]:
    """Micro-batches of ``sampler`` in order, prepared by ``workers`` processes."""
    loader = DataLoader(
        cast("Dataset[BatchT]", dataset),
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals if workers else None,
    )
    for batch in loader:
        if batch.unreadable:
            count.add(batch.unreadable)
        yield batch


def _as_is(batch: Any) -> Any:
    return batch
