"""What the labels of data may be, and what their classes may be called."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from mae_transfer.errors import DataError

logger = logging.getLogger(__name__)


def check_labels(labels: np.ndarray, classes: Sequence[str] | None, name: Callable[[int], str]) -> np.ndarray:
    """``labels`` (N,), each of which must be the number of a class.

    Args:
        classes: their names; None where there are none, and any number from 0 on may be one.
        name: what to call an image.

    Raises:
        DataError: numbers below 0, as splits without labels have them, or without a name.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= (np.inf if classes is None else len(classes))))
    if not len(wrong):
        return labels
    first = int(wrong[0])
    if labels[first] < 0:
        hint = "Test splits are often published without labels (all -1): give a split that has them"
    else:
        hint = "Its labels and its class names do not belong together: write the data again with a name for each class"
    expected = "0 or more" if classes is None else f"0 to {len(classes) - 1}, as {len(classes)} classes are named"
    raise DataError(
        f"{len(wrong)} of {len(labels)} labels are of no class; the first is {labels[first]}, of {name(first)}; "
        f"expected {expected}. {hint}"
    )


def check_class_folders(roots: Sequence[str], classes: Collection[str]) -> None:
    """Look at the folders directly below ``roots``, of which ``classes`` hold images; others are named in a warning.

    Raises:
        DataError: a name that is not UTF-8, which no list of classes could hold.
    """
    for root in roots:
        with os.scandir(root) as entries:
            found = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
        for name in sorted(found):
            if name not in classes:
                logger.warning("class folder %s holds no images that can be used; it is left out", Path(root) / name)
            elif not _is_text(name):
                path = os.fsencode(Path(root) / name).decode("utf-8", "backslashreplace")
                raise DataError(f"class folder {path}: its name is not UTF-8; rename it")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
