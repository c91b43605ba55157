"""The training images of a run: each sample's crop, flip and mask noise are functions of (seed, epoch, index, view)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_transfer.data.batches import Batch, ImageBatch, fixed_images, read_or_replace
from mae_transfer.data.decode import Picture
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.sampler import SampleKey
from mae_transfer.data.source import Source
from mae_transfer.data.transforms import cut, draw_crop
from pretrain.config import DataConfig
from pretrain.masking import MaskSampler


@dataclass(kw_only=True)
class MaskedBatch(Batch):
    """A micro-batch with the noise that its masks are made of.

    Attributes:
        noise: (N, L).
    """

    noise: Tensor


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

        return read_or_replace(self.source, keys[0], crops, seed=self.seed, unreadable=unreadable)[0]

    def _draws(self, purpose: Purpose, key: SampleKey) -> Draws:
        return Draws(seed=self.seed, purpose=purpose, epoch=key.epoch, index=key.index, view=key.view)


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
