"""Features of images encoded once: what a linear probe without augmentation trains on, and neighbours vote with."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_transfer.classification.images import LabelledBatch
from mae_transfer.classification.setting import Setting, readable_batches
from mae_transfer.data.sampler import SampleKey
from mae_transfer.data.source import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Features of images.

    Attributes:
        features: (N, D) float32 on the CPU; zero for images that could not be read.
        readable: (N,) bool.
    """

    features: Tensor
    readable: Tensor


def encode(setting: Setting, source: Source, what: str) -> Encoded:
    """The features of every image of ``source``, seen as in evaluation.

    Processes share the images and all get all features: N·D·4 bytes of each one's memory (3.7 GiB for the 1.28 million
    of ImageNet and ViT-B). Every process must call this.

    Args:
        what: what the images are called in messages.

    Raises:
        RunFailed: more unreadable images than ``data.max_unreadable`` allows.
    """
    before = time.perf_counter()
    features = torch.zeros(len(source), setting.model.width)
    readable = torch.zeros(len(source))
    with setting.evaluating():
        for batch in readable_batches(setting, source, what):
            with setting.precision.autocast():
                encoded = setting.model.encode(setting.to_device(batch.images)).float().cpu()  # (n, D)
            if batch.counts:
                rows = slice(batch.indices.start, batch.indices.stop)
                features[rows] = torch.where(batch.readable[:, None], encoded, 0)
                readable[rows] = batch.readable.float()
    features, readable = setting.processes.sum(features), setting.processes.sum(readable)  # rows of others are zero
    logger.info("encoded the %d images of %s in %.0f s", len(source), what, time.perf_counter() - before)
    return Encoded(features=features, readable=readable.bool())


class CachedFeatures(Dataset[LabelledBatch]):
    """Features in place of images: the same batches of the same samples, without decoding and without an encoder.

    An image that could not be read has the features, and the label, of the next one that could.

    Args:
        labels: (N,).
    """

    def __init__(self, encoded: Encoded, labels: np.ndarray) -> None:
        self.features = encoded.features
        self.labels = torch.from_numpy(labels)
        readable = encoded.readable.numpy()
        following = np.where(readable, np.arange(len(labels)), len(labels))
        following = np.minimum.accumulate(following[::-1])[::-1]
        self._row = torch.from_numpy(np.where(following < len(labels), following, np.flatnonzero(readable)[0]))

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, keys: Sequence[SampleKey]) -> LabelledBatch:
        """What the DataLoader calls with a whole micro-batch."""
        rows = self._row[[key.index for key in keys]]
        return LabelledBatch(images=self.features[rows], labels=self.labels[rows])
