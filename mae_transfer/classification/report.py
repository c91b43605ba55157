"""What a run leaves behind about its accuracy: the confusion matrix as a picture, and a table of the classes."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mae_transfer.classification.evaluate import predict
from mae_transfer.classification.metrics import Predictions, most_confused, per_class
from mae_transfer.classification.setting import Setting
from mae_transfer.engine.files import write_text
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.visualize import plot_confusion

if TYPE_CHECKING:
    from mae_transfer.classification.objective import ClassificationRun

logger = logging.getLogger(__name__)

_COLUMNS = ("class", "images", "top1", "top5", "precision", "most_taken_for", "most_taken_for_images")
_SHOWN = 30  # mistakes beside the picture


def write_report(run: ClassificationRun, folder: RunFolder, predictions: Predictions | None = None) -> None:
    """``confusion.png``, ``per_class.csv`` and ``classes.json`` of the model on ``data.val``; all processes call this.

    Args:
        predictions: what is known already; by default every image is looked at once more.
    """
    if predictions is None:
        (predictions,) = predict(Setting.of(run), run.val_source, run.val_labels)
    if run.processes.is_main:
        write_files(folder.root, predictions, run.classes)


def write_files(folder: Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """The three files; ``classes`` in the order of the model's outputs, as ``classes.json`` keeps them."""
    write_text(folder / "classes.json", json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n")
    write_text(folder / "per_class.csv", class_table(predictions, classes))
    confusion = predictions.confusion
    plot_confusion(
        confusion,
        classes,
        mistakes=most_confused(confusion, _SHOWN),
        path=folder / "confusion.png",
        title=predictions.summary(),
    )
    logger.info("%s; by class in %s and confusion.png", predictions.summary(), folder / "per_class.csv")


def class_table(predictions: Predictions, classes: Sequence[str]) -> str:
    """Comma-separated, a class a line, the hardest first; shares in per cent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in sorted(per_class(predictions, classes), key=lambda result: result.top1):
        other, images = result.taken_for or ("", 0)
        precision = "" if result.precision is None else f"{result.precision:.2f}"
        writer.writerow(
            [result.name, result.images, f"{result.top1:.2f}", f"{result.top5:.2f}", precision, other, images]
        )
    return text.getvalue()
