"""Weighted nearest neighbours against scikit-learn's classifier with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from mae_transfer.classification import knn
from mae_transfer.classification.knn import knn_scores, real_places
from mae_transfer.data.find import open_source
from mae_transfer.errors import ConfigError
from tests.data.test_shards import samples, write_shard
from tests.data.test_tables import table


def data(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Clusters of uneven lengths, so that cosine and Euclidean neighbours differ."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(6, size=count)
    centres = np.random.default_rng(0).normal(size=(6, 12))
    features = (centres[labels] + 1.2 * rng.normal(size=(count, 12))) * rng.uniform(0.2, 5, size=(count, 1))
    return torch.from_numpy(features), torch.from_numpy(labels)


def votes(features: Tensor, k: int, **arguments: object) -> Tensor:
    """All parts put together."""
    return torch.cat([scores[k] for _, scores in knn_scores(features, ks=[k, 1], **arguments)])  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (100, 0.5), (300, 0.02)])
def test_equal_scikit_learns(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float) -> None:
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * 300 * 33)  # several uneven parts
    train, labels = data(300, seed=1)
    features, _ = data(100, seed=2)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.numpy(), labels.numpy())
    ours = votes(features, k, train_features=train, train_labels=labels, num_classes=6, temperature=temperature).clamp(
        min=0
    )
    shares = ours / ours.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(shares.numpy(), theirs.predict_proba(features.numpy()), atol=2e-5)
    assert np.array_equal(ours.argmax(1).numpy(), theirs.predict(features.numpy()))


def test_no_image_is_asked_about_itself() -> None:
    train, labels = data(80, seed=1)
    own = torch.arange(80)
    own[::2] = -1  # every other one is no training image, whatever its features say
    ours = votes(train, 5, train_features=train, train_labels=labels, num_classes=6, own=own)
    for i in range(80):
        others = torch.arange(80) != (i if i % 2 else -1)
        expected = votes(train[i : i + 1], 5, train_features=train[others], train_labels=labels[others], num_classes=6)
        torch.testing.assert_close(ours[i : i + 1], expected)


def test_places_in_shards_and_tables_do_not_depend_on_the_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "data" / "0.tar", samples(0, 3))
    pq.write_table(table(0, 3), tmp_path / "data" / "t.parquet", row_group_size=2)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for name in ("0.tar", "t.parquet"):
        expected = [(str((tmp_path / "data" / name).resolve()), number) for number in range(3)]
        for folder in (tmp_path / "data", tmp_path / "link", Path("data"), Path("link/../data")):
            assert list(real_places(open_source([folder / name]), range(3))) == expected


def test_classes_without_a_vote_have_no_score_and_impossible_k_are_refused() -> None:
    train, labels = data(50, seed=1)
    scores = votes(train[:4], 3, train_features=train, train_labels=labels, num_classes=6)
    assert (scores.isfinite().sum(dim=1) <= 3).all() and (scores.max(dim=1).values >= 1).all()
    with pytest.raises(ConfigError, match=r"knn\.k=51: expected 1 to 50"):
        votes(train, 51, train_features=train, train_labels=labels, num_classes=6)
