"""What a classifier says of every image of a set, each counted once over all processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mae_transfer.classification.features import Encoded, encode
from mae_transfer.classification.metrics import Collector, Predictions
from mae_transfer.classification.setting import Setting, readable_batches
from mae_transfer.data.source import Source
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.trainer import Hook

if TYPE_CHECKING:
    from mae_transfer.classification.objective import ClassificationRun

logger = logging.getLogger(__name__)

_ROWS = 1024  # of features that the head is asked about at a time


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


def predict_from(setting: Setting, encoded: Encoded, labels: np.ndarray) -> Predictions:
    """As ``predict``, of features: every process asks the head about all of them, and none waits for another."""
    collector = Collector(labels, num_classes=setting.model.num_classes)
    with setting.evaluating():
        for start in range(0, len(labels), _ROWS):
            rows = slice(start, min(start + _ROWS, len(labels)))
            with setting.precision.autocast():
                logits = setting.model(encoded.features[rows].to(setting.processes.device)).float()
            collector.add(range(rows.start, rows.stop), logits, encoded.readable[rows])
    return collector.finish(Processes(device=setting.processes.device))


class Evaluation:
    """Top-1, top-5 and loss on ``data.val`` every ``log.evaluate_every_epochs`` and after the last step; with
    ``train.ema`` of the average of the weights too.

    Attributes:
        latest: what the model itself said the last time it was asked.
    """

    def __init__(self, run: ClassificationRun) -> None:
        self.run = run
        self.latest: Predictions | None = None
        # An encoder that never changes sees the images once; from then on its head alone is asked.
        self._encoded: Encoded | None = None

    @property
    def hook(self) -> Hook:
        epochs = self.run.config.log.evaluate_every_epochs
        return Hook(every_steps=self.run.every(epochs) if epochs else self.run.num_steps, run=self)

    def __call__(self, step: int) -> Mapping[str, float]:
        self.latest = self._predict()
        logger.info("step %d: %s, loss %.4f", step, self.latest.summary(), self.latest.mean_loss)
        numbers = {
            "val_top1": self.latest.top(1),
            "val_top5": self.latest.top(5),
            "val_loss": self.latest.mean_loss,
        }
        if self.run.average is None:
            return numbers
        with self.run.average.in_place():
            of_average = self._predict()
        logger.info("step %d: average of the weights: %s", step, of_average.summary())
        return numbers | {
            "val_top1_ema": of_average.top(1),
            "val_top5_ema": of_average.top(5),
            "val_loss_ema": of_average.mean_loss,
        }

    def _predict(self) -> Predictions:
        run, setting = self.run, Setting.of(self.run)
        if run.config.trains_encoder:
            return predict(setting, run.val_source, run.val_labels)[0]
        if self._encoded is None:
            self._encoded = encode(setting, run.val_source, "data.val")
        return predict_from(setting, self._encoded, run.val_labels)
