"""The training images of a run: each sample's crop, flip and mask noise are functions of (seed, epoch, index, view)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_transfer.data.decode import Picture
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.find import open_source
from mae_transfer.data.sampler import SampleKey, StepSampler
from mae_transfer.data.source import CachedImages, Source
from mae_transfer.data.transforms import centre_box, cut, draw_crop, whole_range
from mae_transfer.engine.signals import ignore_stop_signals
from mae_transfer.errors import DataError, RunFailed
from pretrain.config import DataConfig
from pretrain.masking import MaskSampler

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REPLACEMENT_ATTEMPTS = 100


@dataclass(kw_only=True)
class MaskedBatch:
    """A micro-batch.

    Attributes:
        images: (N, C, H, W); uint8 for pictures, else the type of the data (see ``normalise``). In memory the channels
            come last, as decoders and resizing have them.
        noise: (N, L).
        unreadable: what could not be read, index -> reason.
    """

    images: Tensor
    noise: Tensor
    unreadable: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> MaskedBatch:
        return MaskedBatch(images=self.images.pin_memory(), noise=self.noise.pin_memory(), unreadable=self.unreadable)


def open_images(data: DataConfig, roots: Sequence[Path]) -> Source:
    """The images at ``roots``, decoded once into memory if ``data.cache`` says so."""
    source = open_source(roots, channels=data.channels, floats=data.own_statistics, cache=data.scan_cache_folder)
    if data.cache == "ram":
        return CachedImages(source, limit_bytes=int(data.cache_gib * 2**30))
    return source


class MaskedImages(Dataset[MaskedBatch]):
    """Batches by their keys. Nothing is drawn from any state: the same keys give the same batch, anywhere."""

    def __init__(self, source: Source, *, data: DataConfig, sampler: MaskSampler, seed: int) -> None:
        self.source = source
        self.size = data.size
        self.channels = data.channels
        self.scale = (data.crop_scale[0], data.crop_scale[1])
        self.sampler = sampler
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[SampleKey]) -> MaskedBatch:
        """What the DataLoader calls with a whole micro-batch. Views of one image are neighbours: decoded once."""
        unreadable: dict[int, str] = {}
        images = ImageBatch(len(keys), size=self.size, channels=self.channels)
        for _, views in groupby(keys, key=lambda key: (key.epoch, key.index)):
            for image in self._views(list(views), unreadable):
                images.add(image)
        noises = [self.sampler.noise(self._draws(Purpose.MASK, key).generator()) for key in keys]
        return MaskedBatch(images=images.tensor, noise=torch.from_numpy(np.stack(noises)), unreadable=unreadable)

    def _views(self, keys: Sequence[SampleKey], unreadable: dict[int, str]) -> list[Tensor]:
        def crops(picture: Picture) -> list[Tensor]:
            size = (picture.height, picture.width)
            drawn = [draw_crop(self._draws(Purpose.CROP, key), image_size=size, scale=self.scale) for key in keys]
            return cut(picture, drawn, size=self.size)

        return read_or_replace(self.source, keys[0], crops, seed=self.seed, unreadable=unreadable)

    def _draws(self, purpose: Purpose, key: SampleKey) -> Draws:
        return Draws(seed=self.seed, purpose=purpose, epoch=key.epoch, index=key.index, view=key.view)


def read_or_replace(
    source: Source, key: SampleKey, use: Callable[[Picture], T], *, seed: int, unreadable: dict[int, str]
) -> T:
    """What ``use`` makes of the picture of ``key``, or of others drawn from its own stream until one can be read.

    What could not be read is added to ``unreadable``, index -> reason.

    Raises:
        RunFailed: nothing but unreadable images.
    """
    index = key.index
    draws: Draws | None = None
    for _ in range(_REPLACEMENT_ATTEMPTS):
        try:
            return use(source.picture(index))
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
        images.add(read_or_replace(source, SampleKey(0, index), centre, seed=seed, unreadable=unreadable))
    return images.tensor, unreadable


def fixed_batch(
    source: Source,
    *,
    indices: Sequence[int],
    size: tuple[int, int],
    sampler: MaskSampler,
    seed: int,
) -> MaskedBatch:
    """``fixed_images`` with noise that never changes."""
    images, unreadable = fixed_images(source, indices=indices, size=size, seed=seed)
    noises = [
        sampler.noise(Draws(seed=seed, purpose=Purpose.EVALUATION_MASK, index=index).generator()) for index in indices
    ]
    return MaskedBatch(images=images, noise=torch.from_numpy(np.stack(noises)), unreadable=unreadable)


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
    dataset: MaskedImages, sampler: StepSampler, *, workers: int, pin_memory: bool, count: UnreadableCount
) -> Iterator[MaskedBatch]:
    """Micro-batches of ``sampler`` in order, prepared by ``workers`` processes."""
    loader = DataLoader(
        dataset,
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
