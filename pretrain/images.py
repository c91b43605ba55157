"""The training images of a run: each sample's crop, flip and mask noise are functions of (seed, epoch, index)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.sampler import SampleKey, StepSampler
from mae_transfer.data.source import CachedImages, ImageFolder
from mae_transfer.data.transforms import apply_crop, centre_crop, draw_crop
from mae_transfer.engine.signals import ignore_stop_signals
from mae_transfer.errors import DataError, RunFailed
from pretrain.config import DataConfig
from pretrain.masking import MaskSampler

logger = logging.getLogger(__name__)

_REPLACEMENT_ATTEMPTS = 100


@dataclass(kw_only=True)
class MaskedBatch:
    """A micro-batch: images (N, C, H, W) uint8, noise (N, L), and what could not be read, as index -> reason."""

    images: Tensor
    noise: Tensor
    unreadable: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> MaskedBatch:
        return MaskedBatch(images=self.images.pin_memory(), noise=self.noise.pin_memory(), unreadable=self.unreadable)


def open_images(data: DataConfig, roots: Sequence[Path]) -> ImageFolder | CachedImages:
    """The images below ``roots``, decoded once into memory if ``data.cache`` says so."""
    source = ImageFolder(roots, channels=data.channels)
    if data.cache == "ram":
        return CachedImages(source, limit_bytes=int(data.cache_gib * 2**30))
    return source


class MaskedImages(Dataset[MaskedBatch]):
    """Batches by their keys. Nothing is drawn from any state: the same keys give the same batch, anywhere."""

    def __init__(
        self, source: ImageFolder | CachedImages, *, data: DataConfig, sampler: MaskSampler, seed: int
    ) -> None:
        self.source = source
        self.size = data.size
        self.scale = (data.crop_scale[0], data.crop_scale[1])
        self.sampler = sampler
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[SampleKey]) -> MaskedBatch:
        """What the DataLoader calls with a whole micro-batch."""
        unreadable: dict[int, str] = {}
        images, noises = [], []
        for key in keys:
            address = {"seed": self.seed, "epoch": key.epoch, "index": key.index}
            image = read_or_replace(self.source, key, seed=self.seed, unreadable=unreadable)
            crop = draw_crop(
                Draws(purpose=Purpose.CROP, **address), image_size=(image.height, image.width), scale=self.scale
            )
            images.append(apply_crop(image, crop, size=self.size))
            noises.append(self.sampler.noise(Draws(purpose=Purpose.MASK, **address).generator()))
        return MaskedBatch(images=to_batch(images), noise=torch.from_numpy(np.stack(noises)), unreadable=unreadable)


def read_or_replace(
    source: ImageFolder | CachedImages, key: SampleKey, *, seed: int, unreadable: dict[int, str]
) -> Image.Image:
    """The image of ``key``, or of other indices drawn from its own stream until one can be read.

    What could not be read is added to ``unreadable``, index -> reason.

    Raises:
        RunFailed: nothing but unreadable images.
    """
    index = key.index
    draws = Draws(seed=seed, purpose=Purpose.REPLACEMENT, epoch=key.epoch, index=key.index)
    for _ in range(_REPLACEMENT_ATTEMPTS):
        try:
            return source[index]
        except DataError as error:
            unreadable[index] = str(error)
            index = int(draws.words(1)[0] % np.uint64(len(source)))
    raise RunFailed(f"{_REPLACEMENT_ATTEMPTS} images in a row cannot be read; the last: {unreadable[index]}")


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """Images (H, W, C) uint8 as (N, C, H, W)."""
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def fixed_batch(
    source: ImageFolder | CachedImages,
    *,
    indices: Sequence[int],
    size: tuple[int, int],
    sampler: MaskSampler,
    seed: int,
) -> MaskedBatch:
    """Images for evaluation and pictures: uncropped but for the aspect ratio, with noise that never changes."""
    unreadable: dict[int, str] = {}
    read = [read_or_replace(source, SampleKey(0, index), seed=seed, unreadable=unreadable) for index in indices]
    images = [centre_crop(image, size=size) for image in read]
    noises = [
        sampler.noise(Draws(seed=seed, purpose=Purpose.EVALUATION_MASK, index=index).generator()) for index in indices
    ]
    return MaskedBatch(images=to_batch(images), noise=torch.from_numpy(np.stack(noises)), unreadable=unreadable)


class UnreadableCount:
    """Names each unreadable image once, and stops the run above a share of the data."""

    def __init__(self, *, num_samples: int, limit: float) -> None:
        self.num_samples = num_samples
        self.limit = limit
        self.seen: set[int] = set()

    def add(self, unreadable: dict[int, str]) -> None:
        """Raises RunFailed above the limit."""
        for index, reason in unreadable.items():
            if index not in self.seen:
                self.seen.add(index)
                logger.warning("%s; another image takes its place (%d unreadable so far)", reason, len(self.seen))
        if len(self.seen) > self.limit * self.num_samples:
            raise RunFailed(
                f"{len(self.seen)} of {self.num_samples} images cannot be read, more than data.max_unreadable="
                f"{self.limit:g} allows; repair or remove the files named above, or raise data.max_unreadable"
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
