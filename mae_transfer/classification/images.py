"""Labelled images: augmented views to train on, and every image once, as it is, to test on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_transfer.classification.augment import Erased, Recolour, draw_erased
from mae_transfer.classification.views import evaluation_view
from mae_transfer.data.batches import Batch, ImageBatch, read_or_replace
from mae_transfer.data.choice import shares
from mae_transfer.data.decode import Picture
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.sampler import SampleKey
from mae_transfer.data.source import Source
from mae_transfer.data.transforms import cut, draw_crop
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.signals import ignore_stop_signals
from mae_transfer.errors import DataError

if TYPE_CHECKING:
    from mae_transfer.classification.config import ClassificationConfig


@dataclass(kw_only=True)
class LabelledBatch(Batch):
    """A micro-batch of images, or of their features (N, D), and what was drawn for it (``augment.finish_batch``).

    Attributes:
        labels: (N,) int64.
        erased: the boxes to erase, each with the place of its image in the batch.
        noise: (n,) float32, the values of those boxes one after the other.
        word: seeds what mixup and cutmix draw.
    """

    labels: Tensor
    erased: list[tuple[int, Erased]] = field(default_factory=list)
    noise: Tensor = field(default_factory=lambda: torch.empty(0))
    word: int = 0


class LabelledImages(Dataset[LabelledBatch]):
    """Batches by their keys. Nothing is drawn from any state: the same keys give the same batch, anywhere.

    Args:
        labels: (N,) of the images of ``source``.
        config: filled: nothing of what is used here is null.
    """

    def __init__(self, source: Source, labels: np.ndarray, *, config: ClassificationConfig, seed: int) -> None:
        data, augment = config.data, config.augmentation
        self.source = source
        self.labels = labels
        self.augment = augment
        self.seed = seed
        self.size = data.size
        self.scale = (data.crop_scale[0], data.crop_scale[1])
        self.crop_share = data.crop_share
        auto = None if augment.auto == "none" else augment.auto
        self.recolour = Recolour(auto, augment.color_jitter, size=data.size, mean=data.normalisation[0])

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[SampleKey]) -> LabelledBatch:
        """What the DataLoader calls with a whole micro-batch. Views of one image are neighbours: decoded once."""
        unreadable: dict[int, str] = {}
        images = ImageBatch(len(keys), size=self.size, channels=self.source.channels)
        labels = []
        for _, group in groupby(keys, key=lambda key: (key.epoch, key.index)):
            views = list(group)
            made, index = read_or_replace(
                self.source, views[0], partial(self._views, views), seed=self.seed, unreadable=unreadable
            )
            for image in made:
                images.add(image)
                labels.append(int(self.labels[index]))
        erased, noise = self._erased(keys)
        return LabelledBatch(
            images=images.tensor,
            labels=torch.tensor(labels),
            erased=erased,
            noise=noise,
            word=int(self._draws(Purpose.MIXUP, keys[0]).words(1)[0]),
            unreadable=unreadable,
        )

    def _views(self, keys: Sequence[SampleKey], picture: Picture) -> list[Tensor]:
        if self.augment.kind == "none":
            return [evaluation_view(picture, size=self.size, crop=self.crop_share)] * len(keys)
        size = (picture.height, picture.width)
        crops = [
            draw_crop(self._draws(Purpose.CROP, key), image_size=size, scale=self.scale, flip=self.augment.flip)
            for key in keys
        ]
        return [
            self.recolour(image, int(self._draws(Purpose.AUGMENT, key).words(1)[0]))
            for image, key in zip(cut(picture, crops, size=self.size), keys, strict=True)
        ]

    def _erased(self, keys: Sequence[SampleKey]) -> tuple[list[tuple[int, Erased]], Tensor]:
        augment = self.augment
        boxes, values = [], [np.empty(0, np.float32)]
        for place, key in enumerate(keys if augment.erase else ()):
            drawn = draw_erased(
                self._draws(Purpose.ERASE, key),
                probability=augment.erase,
                mode=augment.erase_mode,
                size=self.size,
                channels=self.source.channels,
            )
            if drawn is not None:
                boxes.append((place, drawn[0]))
                values.append(drawn[1].reshape(-1))
        return boxes, torch.from_numpy(np.concatenate(values))

    def _draws(self, purpose: Purpose, key: SampleKey) -> Draws:
        return Draws(seed=self.seed, purpose=purpose, epoch=key.epoch, index=key.index, view=key.view)


@dataclass(kw_only=True)
class EvaluationBatch(Batch):
    """A batch of images to test on.

    Attributes:
        readable: (N,) bool; the pixels of the others are zero. Nothing takes their place: it would be judged by
            another image's label.
        indices: of the images in their source.
        counts: whether the batch counts (``data.choice.shares``).
    """

    readable: Tensor
    indices: range
    counts: bool = True


class EvaluationImages(Dataset[EvaluationBatch]):
    """The evaluation view of each image, by ranges of indices."""

    def __init__(self, source: Source, *, size: tuple[int, int], crop: float) -> None:
        self.source = source
        self.size = size
        self.crop = crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: range) -> EvaluationBatch:
        """What the DataLoader calls with a whole batch."""
        unreadable: dict[int, str] = {}
        views: list[Tensor | None] = []
        for index in indices:
            try:
                views.append(evaluation_view(self.source.picture(index), size=self.size, crop=self.crop))
            except DataError as error:
                unreadable[index] = str(error)
                views.append(None)
        kind = next((view.dtype for view in views if view is not None), torch.uint8)
        images = ImageBatch(len(indices), size=self.size, channels=self.source.channels)
        for view in views:
            images.add(torch.zeros(*self.size, 1, dtype=kind) if view is None else view)
        return EvaluationBatch(
            images=images.tensor,
            readable=torch.tensor([view is not None for view in views]),
            indices=indices,
            unreadable=unreadable,
        )


def evaluation_batches(images: EvaluationImages, processes: Processes, *, workers: int) -> Iterator[EvaluationBatch]:
    """This process's share of all images, in batches prepared by ``workers`` processes.

    All processes get equally many batches, as a sharded model needs, and one that would have fewer a last one that
    does not count.
    """
    parts = list(shares(len(images), processes))
    loader = DataLoader(
        images,
        batch_sampler=cast("list[list[int]]", [places for places, _ in parts]),
        collate_fn=_as_is,
        num_workers=min(workers, len(parts)),
        pin_memory=processes.device.type == "cuda",
        worker_init_fn=ignore_stop_signals if workers else None,
    )
    for batch, (_, counts) in zip(loader, parts, strict=True):
        batch.counts = counts
        yield batch


def _as_is(batch: Any) -> Any:
    return batch
