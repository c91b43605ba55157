"""What a classifier says of every image of a set, each counted once over all processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mae_transfer.classification.images import EvaluationBatch, EvaluationImages, evaluation_batches
from mae_transfer.classification.metrics import Collector, Predictions
from mae_transfer.data.batches import UnreadableCount
from mae_transfer.data.source import Source
from mae_transfer.data.transforms import normalise
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.trainer import Hook

if TYPE_CHECKING:
    from mae_transfer.classification.config import DataConfig
    from mae_transfer.classification.model import Classifier
    from mae_transfer.classification.objective import ClassificationRun

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
        RunFailed: more unreadable images than ``data.max_unreadable`` allows.
    """
    data = setting.data
    images = EvaluationImages(source, size=data.size, crop=data.crop_share)
    count = UnreadableCount(num_samples=len(source), limit=data.max_unreadable)
    for batch in evaluation_batches(images, setting.processes, workers=data.workers):
        for reason in (reason for index, reason in batch.unreadable.items() if index not in count.seen):
            logger.warning("%s; it is left out of %s", reason, what)
        count.merge(batch.unreadable)
        count.check()
        yield batch


def predict(
    setting: Setting,
    source: Source,
    labels: np.ndarray,
    *,
    what: str = "data.val",
    among: Sequence[int] | None = None,
) -> list[Predictions]:
    """What a model says of every image of ``source``; all processes call this and get it.

    Args:
        labels: (N,) of its images, in the model's numbering.
        what: what the images are called in messages.
        among: the classes to choose among, where others cannot be right; None for all.

    Returns:
        Predictions among all classes and, where ``among`` is given, among those.

    Raises:
        RunFailed: more unreadable images than ``data.max_unreadable`` allows.
    """
    model, processes = setting.model, setting.processes
    collectors = [Collector(labels, num_classes=model.num_classes) for _ in range(1 if among is None else 2)]
    impossible = torch.ones(model.num_classes, dtype=torch.bool, device=processes.device)
    impossible[list(among or ())] = False
    with setting.evaluating():
        for batch in readable_batches(setting, source, what):
            with setting.precision.autocast():
                logits = model(setting.to_device(batch.images)).float()  # (n, c)
            if batch.counts:
                collectors[0].add(batch.indices, logits, batch.readable)
                if among is not None:
                    collectors[1].add(batch.indices, logits.masked_fill(impossible, -torch.inf), batch.readable)
    return [collector.finish(processes) for collector in collectors]


def evaluation_hook(run: ClassificationRun) -> Hook:
    """Top-1, top-5 and loss on ``data.val`` every ``log.evaluate_every_epochs``, and after the last step."""

    def evaluate(step: int) -> Mapping[str, float]:
        (predictions,) = predict(Setting.of(run), run.val_source, run.val_labels)
        logger.info("step %d: %s, loss %.4f", step, predictions.summary(), predictions.mean_loss)
        return {"val_top1": predictions.top(1), "val_top5": predictions.top(5), "val_loss": predictions.mean_loss}

    epochs = run.config.log.evaluate_every_epochs
    return Hook(every_steps=run.every(epochs) if epochs else run.num_steps, run=evaluate)
