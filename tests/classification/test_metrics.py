"""Accuracy, classes and confusion against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_score, recall_score, top_k_accuracy_score
from torch.nn import functional as F

from mae_transfer.classification.metrics import (
    NEVER,
    Collector,
    Predictions,
    most_confused,
    per_class,
    rank_of_truth,
)
from mae_transfer.engine.distribution import Processes

ALONE = Processes(device=torch.device("cpu"))


def collected(scores: torch.Tensor, labels: np.ndarray, readable: torch.Tensor | None = None) -> Predictions:
    """In two parts, as batches come."""
    collector = Collector(labels, num_classes=scores.shape[1])
    readable = torch.ones(len(labels), dtype=torch.bool) if readable is None else readable
    for part in (range(20), range(20, len(labels))):
        rows = slice(part.start, part.stop)
        collector.add(part, scores[rows], readable[rows])
    return collector.finish(ALONE)


def test_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(9, size=300)
    scores = torch.from_numpy(rng.normal(size=(300, 9)) + 1.5 * np.eye(9)[labels])
    found = collected(scores, labels)
    names = [f"class {i}" for i in range(9)]
    for k in (1, 2, 5):
        assert found.top(k) == pytest.approx(100 * top_k_accuracy_score(labels, scores.numpy(), k=k))
    assert found.mean_loss == pytest.approx(F.cross_entropy(scores, torch.from_numpy(labels)).item(), rel=1e-6)
    assert np.array_equal(found.confusion, confusion_matrix(labels, scores.argmax(1).numpy()))
    results = per_class(found, names)
    recall = recall_score(labels, found.predicted, average=None)
    precision = precision_score(labels, found.predicted, average=None)
    for number, result in enumerate(results):
        own = labels == number
        assert result.name == names[number] and result.images == own.sum()
        assert result.top1 == pytest.approx(100 * recall[number])
        assert result.precision == pytest.approx(100 * precision[number])
        five = top_k_accuracy_score(labels[own], scores.numpy()[own], k=5, labels=range(9))
        assert result.top5 == pytest.approx(100 * five)


def test_unreadable_images_count_nowhere() -> None:
    rng = np.random.default_rng(1)
    labels, readable = rng.integers(4, size=50), torch.from_numpy(rng.random(50) < 0.8)
    scores = torch.from_numpy(rng.normal(size=(50, 4)))
    found = collected(scores, labels, readable)
    kept = readable.numpy()
    expected = collected(scores[readable], labels[kept])
    assert found.confusion.sum() == kept.sum()
    assert np.array_equal(found.confusion, expected.confusion)
    assert (found.top(1), found.mean_loss) == (expected.top(1), pytest.approx(expected.mean_loss))
    assert f"{50 - kept.sum()} unreadable left out" in found.summary()


def test_ranks_ties_by_class_and_never_counts_what_is_not_a_number() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [torch.nan, 2.0, 1.0], [torch.nan, 2.0, 1.0]])
    assert rank_of_truth(scores, torch.tensor([0, 1, 0, 1])).tolist() == [0, 1, NEVER, NEVER]
    rows = torch.full((1, 3), -torch.inf)
    assert rank_of_truth(rows, torch.tensor([0])).tolist() == [NEVER]


@pytest.mark.parametrize(
    ("row", "truth"),
    [
        ([torch.nan, torch.nan, torch.nan], 0),
        ([torch.nan, 5.0, 1.0], 0),
        ([torch.nan, 5.0, 1.0], 1),
        ([1.0, torch.inf, 2.0], 1),
        ([-torch.inf, -torch.inf, -torch.inf], 0),
        ([1.0, -torch.inf, 2.0], 1),
    ],
)
def test_scores_that_are_not_finite_are_wrong_by_every_measure(row: list[float], truth: int) -> None:
    """Of three classes too, where any finite score is among the five highest."""
    scores = torch.cat([torch.tensor([row]), torch.eye(3)[torch.arange(20) % 3]])
    found = collected(scores, np.array([truth, *(np.arange(20) % 3)]))
    results = per_class(found, ["a", "b", "c"])
    assert found.top(1) == found.top(5) == pytest.approx(100 * 20 / 21)
    assert found.confusion.trace() == 20 and sum(result.images for result in results) == 21
    own = results[truth]
    assert own.top1 == own.top5 == pytest.approx(100 * (own.images - 1) / own.images)
    best = torch.tensor(row).max()
    assert ("1 wrong as their scores are not finite" in found.summary()) == (not best.isfinite())


def test_most_confused_pairs_are_in_order_and_leave_out_what_is_right() -> None:
    confusion = np.array([[9, 2, 0], [3, 1, 2], [0, 0, 5]])
    assert most_confused(confusion, 10) == [(1, 0, 3), (0, 1, 2), (1, 2, 2)]
    assert most_confused(confusion, 1) == [(1, 0, 3)]
    assert most_confused(np.eye(3, dtype=np.int64), 5) == []
