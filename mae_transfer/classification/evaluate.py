"""What a classifier says of every image of a set, each counted once over all processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mae_transfer.classification.images import EvaluationBatch, EvaluationImages, evaluation_batches
from mae_transfer.classification.metrics import Collector, Predictions
from mae_transfer.data.batches import UnreadableCount
from mae_transfer.data.source import Source
from mae_transfer.engine.trainer import Hook

if TYPE_CHECKING:
    from mae_transfer.classification.objective import ClassificationRun

logger = logging.getLogger(__name__)


def readable_batches(run: ClassificationRun, source: Source, what: str) -> Iterator[EvaluationBatch]:
    """This process's share of the images of ``source``; what cannot be read is named in a warning and marked.

    Raises:
        RunFailed: more unreadable images than ``data.max_unreadable`` allows.
    """
    data = run.config.data
    assert data.eval_crop is not None
    images = EvaluationImages(source, size=data.size, crop=data.eval_crop)
    count = UnreadableCount(num_samples=len(source), limit=data.max_unreadable)
    for batch in evaluation_batches(images, run.processes, workers=data.workers):
        for reason in (reason for index, reason in batch.unreadable.items() if index not in count.seen):
            logger.warning("%s; it is left out of %s", reason, what)
        count.merge(batch.unreadable)
        count.check()
        yield batch


@torch.no_grad()
def predict(
    run: ClassificationRun,
    source: Source,
    labels: np.ndarray,
    *,
    what: str = "data.val",
    among: Sequence[int] | None = None,
) -> list[Predictions]:
    """What the model of ``run`` says of every image of ``source``; all processes call this and get it.

    The model is in evaluation mode meanwhile and afterwards as it was.

    Args:
        labels: (N,) of its images, in the model's numbering.
        what: the key that the images were given by, for messages.
        among: the classes to choose among, where others cannot be right; None for all.

    Returns:
        Predictions among all classes and, where ``among`` is given, among those.

    Raises:
        RunFailed: more unreadable images than ``data.max_unreadable`` allows.
    """
    model, num_classes = run.model, run.model.num_classes
    collectors = [Collector(labels, num_classes=num_classes) for _ in range(1 if among is None else 2)]
    impossible = torch.ones(num_classes, dtype=torch.bool, device=run.processes.device)
    impossible[list(among or ())] = False
    training = model.training
    model.eval()
    try:
        for batch in readable_batches(run, source, what):
            with run.precision.autocast():
                logits = model(run.to_device(batch.images)).float()  # (n, c)
            if batch.counts:
                collectors[0].add(batch.indices, logits, batch.readable)
                if among is not None:
                    collectors[1].add(batch.indices, logits.masked_fill(impossible, -torch.inf), batch.readable)
    finally:
        model.train(training)
    return [collector.finish(run.processes) for collector in collectors]


def evaluation_hook(run: ClassificationRun) -> Hook:
    """Top-1, top-5 and loss on ``data.val`` every ``log.evaluate_every_epochs``, and after the last step."""

    def evaluate(step: int) -> Mapping[str, float]:
        (predictions,) = predict(run, run.val_source, run.val_labels)
        logger.info("step %d: %s, loss %.4f", step, predictions.summary(), predictions.mean_loss)
        return {"val_top1": predictions.top(1), "val_top5": predictions.top(5), "val_loss": predictions.mean_loss}

    epochs = run.config.log.evaluate_every_epochs
    return Hook(every_steps=run.every(epochs) if epochs else run.num_steps, run=evaluate)
