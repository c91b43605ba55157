"""The linear probe against scikit-learn's logistic regression."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_transfer.errors import ConfigError
from mae_transfer.probe import ProbeConfig, fit_probe, top_accuracies


def clusters(count: int, *, seed: int, classes: int = 7, width: int = 20) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussians whose features have very different scales."""
    centres = np.random.default_rng(0).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    features = (centres[labels] + 1.5 * rng.normal(size=(count, width))) * np.logspace(-1, 2, width) + 5
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_reaches_the_optimum_that_scikit_learn_finds(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    features, labels = clusters(400, seed=1)
    unseen, truth = clusters(1000, seed=2)
    probe = fit_probe(features, labels, num_classes=7, l2=l2)

    scaler = preprocessing.StandardScaler().fit(features.double().numpy())
    theirs = linear_model.LogisticRegression(C=1 / (l2 * len(labels)), max_iter=10000, tol=1e-10)
    theirs.fit(scaler.transform(features.double().numpy()), labels.numpy())
    x = torch.from_numpy(scaler.transform(features.double().numpy()))
    weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    objective = F.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
    assert probe.objective == pytest.approx(objective.item(), rel=1e-4)
    torch.testing.assert_close(probe.weight.double(), weight, rtol=0, atol=5e-3)
    predicted = theirs.predict(scaler.transform(unseen.double().numpy()))
    ours = probe.logits(unseen).argmax(dim=1).numpy()
    assert (ours == predicted).mean() > 0.995
    accuracy = top_accuracies(probe.logits(unseen), truth)[0]
    assert accuracy == pytest.approx(100 * (predicted == truth.numpy()).mean(), abs=0.5) and accuracy > 50


def test_draws_nothing_keeps_nothing_and_needs_no_gradient_of_the_features() -> None:
    features, labels = clusters(200, seed=1)
    features.requires_grad_()
    state = torch.get_rng_state()
    with torch.no_grad():  # as hooks of a run are called
        first = fit_probe(features, labels, num_classes=7)
    second = fit_probe(features, labels, num_classes=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert features.grad is None and not first.weight.requires_grad


def test_features_that_do_not_vary_and_classes_that_do_not_occur() -> None:
    features, labels = clusters(100, seed=1)
    features[:, 3] = 2.0
    probe = fit_probe(features, labels, num_classes=9)
    assert probe.logits(features).isfinite().all() and probe.weight[:, 3].abs().max() < 1e-3
    assert probe.logits(features).argmax(dim=1).max() < 7


def test_accuracies_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 0, 2, 1]])
    assert top_accuracies(logits, torch.tensor([0, 2, 1]), (1, 2, 4)) == pytest.approx([100 / 3, 200 / 3, 100])
    assert top_accuracies(logits[:, :2], torch.tensor([0, 0, 1])) == pytest.approx([100 / 3, 100])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"train_path": "a"}, "go together"),
        ({"every_epochs": -1.0}, "must not be negative"),
        ({"images": 0}, "at least 1"),
    ],
)
def test_bad_values_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ProbeConfig(**bad)
