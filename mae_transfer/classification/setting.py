"""How a model is shown images that it is not trained on: each once over all processes, as in evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mae_transfer.classification.images import EvaluationBatch, EvaluationImages, evaluation_batches
from mae_transfer.data.batches import UnreadableCount
from mae_transfer.data.source import Source
from mae_transfer.data.transforms import normalise
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.precision import Precision

if TYPE_CHECKING:
    from mae_transfer.classification.model import Classifier
    from mae_transfer.classification.objective import ClassificationRun
    from mae_transfer.classification.sections import DataConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which model sees images, how it is shown them, and where.

    Attributes:
        data: says the images' size, crop and reading.
        mean, std: of each channel.
    """

    model: Classifier
    data: DataConfig
    mean: Sequence[float]
    std: Sequence[float]
    precision: Precision
    processes: Processes

    @classmethod
    def of(cls, run: ClassificationRun) -> Setting:
        return cls(
            model=run.model,
            data=run.config.data,
            mean=run.mean,
            std=run.std,
            precision=run.precision,
            processes=run.processes,
        )

    def to_device(self, images: Tensor) -> Tensor:
        """(N, C, H, W) as decoded to normalised float32 where the model is."""
        return normalise(images.to(self.processes.device, non_blocking=True), self.mean, self.std)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode for the block, without gradients; afterwards as it was."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)


def readable_batches(setting: Setting, source: Source, what: str) -> Iterator[EvaluationBatch]:
    """This process's share of the images of ``source``; what cannot be read is named in a warning and marked.

    Raises:
        RunFailed: more unreadable images than ``data.max_unreadable`` allows, in all processes together. One that is
            alone stops there; of several each goes on to the end, where all learn of it.
    """
    data, processes = setting.data, setting.processes
    images = EvaluationImages(source, size=data.size, crop=data.crop_share)
    count = UnreadableCount(num_samples=len(source), limit=data.max_unreadable)
    unreadable = torch.zeros(len(source), dtype=torch.uint8)
    for batch in evaluation_batches(images, processes, workers=data.workers):
        if batch.counts and batch.unreadable:
            for reason in batch.unreadable.values():
                logger.warning("%s; it is left out of %s", reason, what)
            unreadable[list(batch.unreadable)] = 1
            count.merge(batch.unreadable)
            if not processes.is_distributed:
                count.check()
        yield batch
    count.merge(processes.sum(unreadable).nonzero()[:, 0].tolist())
    count.check()
