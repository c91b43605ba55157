"""Accuracy from what a classifier said of each image: top-k, loss, classes one by one, who is taken for whom.

Shapes: N images, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_transfer.engine.distribution import Processes

NEVER = 2**31 - 1  # the rank of a truth that is not among any number of classes


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What became of each image of a set.

    Attributes:
        labels: (N,) int64, the truth.
        predicted: (N,) int64, the class that scored highest; −1 for an image that could not be read, which counts
            nowhere; c where no class did, as the highest score is not finite or one is NaN.
        rank: (N,) int64, how many classes scored above the truth (an equal score counts as above where its class comes
            first); ``NEVER`` where the truth has no finite score or a score is NaN.
        loss: (N,) float64, cross-entropy; NaN where scores are no logits.
        num_classes: c.
    """

    labels: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    loss: np.ndarray
    num_classes: int

    @cached_property
    def readable(self) -> np.ndarray:
        """(N,) bool."""
        return self.predicted >= 0

    def top(self, k: int) -> float:
        """The share of images, in per cent, whose class is among the k that score highest."""
        return 100 * float((self.rank[self.readable] < k).mean())

    @property
    def mean_loss(self) -> float:
        return float(self.loss[self.readable].mean())

    @cached_property
    def confusion(self) -> np.ndarray:
        """(c, c) int64: images of the class of the row taken for the class of the column, without those that were
        taken for none."""
        taken = self.readable & (self.predicted < self.num_classes)
        cells = self.labels[taken] * self.num_classes + self.predicted[taken]
        return np.bincount(cells, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)

    def summary(self) -> str:
        """A line about them."""
        left_out = int((~self.readable).sum())
        note = f", {left_out} unreadable left out" if left_out else ""
        of_none = int((self.predicted == self.num_classes).sum())
        note += f", {of_none} wrong as their scores are not finite" if of_none else ""
        return f"top-1 {self.top(1):.2f} %, top-5 {self.top(5):.2f} % of {int(self.readable.sum())} images{note}"


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """One class.

    Attributes:
        images: how many there are of it.
        top1, top5: per cent of them.
        precision: per cent of the images taken for this class that are of it; None where none was.
        taken_for: the other class that most of its images were taken for, and how many of them; None where none was.
    """

    name: str
    images: int
    top1: float
    top5: float
    precision: float | None
    taken_for: tuple[str, int] | None


def per_class(predictions: Predictions, classes: Sequence[str]) -> list[ClassResult]:
    """Each class that has images, in the order of the classes."""
    confusion = predictions.confusion
    right = confusion.diagonal()
    taken = confusion.sum(axis=0)
    labels, rank = predictions.labels[predictions.readable], predictions.rank[predictions.readable]
    totals = np.bincount(labels, minlength=predictions.num_classes)
    in_five = np.bincount(labels[rank < 5], minlength=predictions.num_classes)
    results = []
    for number, name in enumerate(classes):
        images = int(totals[number])
        if not images:
            continue
        others = confusion[number].copy()
        others[number] = 0
        most = int(others.argmax())
        results.append(
            ClassResult(
                name=name,
                images=images,
                top1=100 * float(right[number]) / images,
                top5=100 * float(in_five[number]) / images,
                precision=100 * float(right[number] / taken[number]) if taken[number] else None,
                taken_for=(classes[most], int(others[most])) if others[most] else None,
            )
        )
    return results


def most_confused(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """At most ``count`` (class, taken for, images), most images first, equal numbers in the order of the classes."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    cells = np.flatnonzero(wrong)
    order = cells[np.argsort(-wrong.ravel()[cells], kind="stable")][:count]
    pairs = (divmod(cell, len(confusion)) for cell in order.tolist())
    return [(row, column, int(wrong[row, column])) for row, column in pairs]


def rank_of_truth(scores: Tensor, labels: Tensor) -> Tensor:
    """``Predictions.rank`` of scores (N, c) and labels (N,): (N,) int64."""
    own = scores.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]  # (N, c)
    above = (scores > own) | ((scores == own) & earlier)
    return torch.where(own[:, 0].isfinite() & ~scores.isnan().any(dim=1), above.sum(dim=1), NEVER)


def highest(scores: Tensor) -> Tensor:
    """``Predictions.predicted`` of scores (N, c): (N,) int64."""
    score, number = scores.max(dim=1)  # NaN where a score is; of equal ones the first
    return torch.where(score.isfinite(), number, scores.shape[1])


class Collector:
    """Puts together what processes find out, each about its own images.

    Args:
        labels: (N,) of all images.
    """

    def __init__(self, labels: np.ndarray, *, num_classes: int) -> None:
        self.labels = labels
        self.num_classes = num_classes
        # Rows of images that another process sees stay zero, so that the sum over processes is what each has seen.
        self._found = torch.zeros(len(labels), 3, dtype=torch.float64)  # predicted + 1, rank, loss

    def add(self, indices: Sequence[int], scores: Tensor, readable: Tensor, *, are_logits: bool = True) -> None:
        """Scores (n, c) of the images ``indices``; of those that are not ``readable`` (n,) nothing is taken."""
        scores = scores.float()
        labels = torch.from_numpy(self.labels[list(indices)]).to(scores.device)
        loss = (
            F.cross_entropy(scores, labels, reduction="none")
            if are_logits
            else torch.full_like(scores[:, 0], torch.nan)
        )
        rows = torch.stack([highest(scores) + 1, rank_of_truth(scores, labels), loss.double()], dim=1)
        readable = readable.to(rows.device)
        self._found[list(indices)] = torch.where(readable[:, None], rows, 0).cpu()

    def finish(self, processes: Processes) -> Predictions:
        """All images; every process calls this and gets them."""
        found = processes.sum(self._found).numpy()
        return Predictions(
            labels=self.labels,
            predicted=found[:, 0].astype(np.int64) - 1,
            rank=found[:, 1].astype(np.int64),
            loss=found[:, 2],
            num_classes=self.num_classes,
        )
