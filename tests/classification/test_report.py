"""The files about a run's accuracy."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_transfer.classification.metrics import Predictions
from mae_transfer.classification.report import class_table, write_files


def predictions(num_classes: int, *, count: int = 400) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(num_classes - 1, size=count)  # none of the last class
    wrong = rng.random(count) < 0.3
    predicted = np.where(wrong, (labels + 1) % num_classes, labels)
    rank = np.where(wrong, rng.integers(1, 8, size=count), 0)
    return Predictions(labels=labels, predicted=predicted, rank=rank, loss=np.ones(count), num_classes=num_classes)


def test_the_table_has_the_hardest_class_first_and_quotes_names() -> None:
    found = predictions(4)
    names = ["cat, wild", "dog", 'the "third"', "never seen"]
    rows = list(csv.DictReader(io.StringIO(class_table(found, names))))
    assert {row["class"] for row in rows} == set(names[:3])
    shares = [float(row["top1"]) for row in rows]
    assert shares == sorted(shares) and all(float(row["top5"]) >= float(row["top1"]) for row in rows)
    cat = next(row for row in rows if row["class"] == "cat, wild")
    own = found.labels == 0
    assert int(cat["images"]) == own.sum()
    assert float(cat["top1"]) == pytest.approx(100 * (found.predicted[own] == 0).mean(), abs=0.005)
    assert (cat["most_taken_for"], int(cat["most_taken_for_images"])) == ("dog", (found.predicted[own] == 1).sum())
    assert float(cat["precision"]) == 100  # none of the last class, which alone is taken for the first


@pytest.mark.parametrize("num_classes", [3, 40])
def test_writes_names_table_and_picture(tmp_path: Path, num_classes: int) -> None:
    names = [f"class {number}" for number in range(num_classes)]
    write_files(tmp_path, predictions(num_classes), names)
    assert json.loads((tmp_path / "classes.json").read_text()) == names
    assert (tmp_path / "per_class.csv").read_text().count("\n") == num_classes
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.json", "confusion.png", "per_class.csv"]
