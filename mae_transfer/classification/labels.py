"""Which class of a model's the images of a folder are of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mae_transfer.data.source import Source
from mae_transfer.errors import ConfigError, nearest


def read_class_map(path: str | None) -> dict[str, str | int]:
    """``data.class_map``: folder -> class, or the number of one. Empty for None.

    Raises:
        ConfigError: not such a file.
    """
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.class_map={path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(type(value) in (str, int) for value in content.values()):
        raise ConfigError(
            f"data.class_map={path}: expected a JSON object of folder -> class name or number, such as "
            '{"cat": "n02123045"}'
        )
    return content


def class_numbers(
    source: Source,
    names: Sequence[str] | None,
    *,
    num_classes: int,
    renamed: Mapping[str, str | int],
    key: str,
) -> np.ndarray:
    """The labels of ``source`` in the model's numbering, (N,) int64.

    A folder is the class of its name, or of what it is ``renamed`` to; several may be of one class. Where the model's
    classes have no names, and folders are not given numbers, there must be as many folders as classes: their order is
    then the numbering, as torchvision's ImageFolder, with which such models were trained, has it.

    Raises:
        ConfigError: a single class, no labels, folders that are no class of the model's, or classes that cannot be
            told. DataError: labels that are no class's.
    """
    if num_classes == 1:
        called = f" class folder ({names[0]})" if names else " class"
        raise ConfigError(
            f"there is only one{called} to train on, and nothing to tell it from; data.train needs a folder of images "
            "for each of two or more classes"
        )
    labels, folders = source.labels, source.classes
    if labels is None:
        raise ConfigError(f"{key} has no labels; give a folder of images for each class (or data that hold labels)")
    if folders is None:
        if int(labels.max()) >= num_classes:
            raise ConfigError(f"{key} has labels up to {int(labels.max())}, and the model knows {num_classes} classes")
        return labels
    targets = [renamed.get(folder, folder) for folder in folders]
    if names is None and any(isinstance(target, str) for target in targets):
        if len(folders) == num_classes and not renamed:
            return labels
        raise ConfigError(
            f"{key} has {len(folders)} classes, and the checkpoint does not name its {num_classes}; give the folder "
            "that it was trained on as data.train, or data.class_map=FILE with a number for each folder"
        )
    numbers = {name: number for number, name in enumerate(names or ())}
    found = [target if isinstance(target, int) else numbers.get(target, -1) for target in targets]
    unknown = [place for place, number in enumerate(found) if not 0 <= number < num_classes]
    if unknown:
        raise ConfigError(_unknown_message(key, unknown, folders, targets, numbers))
    return np.array(found, np.int64)[labels]


def _unknown_message(
    key: str, unknown: Sequence[int], folders: Sequence[str], targets: Sequence[str | int], numbers: Mapping[str, int]
) -> str:
    called = [
        folders[place] if folders[place] == targets[place] else f"{folders[place]} ({targets[place]})"
        for place in unknown[:5]
    ]
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    guess = nearest(str(targets[unknown[0]]), numbers)
    hint = f"; is {called[0]} {guess}?" if guess else "."
    return (
        f"{key} has classes that the model does not know: {', '.join(called)}{more}{hint} Say which they are in "
        'data.class_map=FILE.json ({"folder": "class"}), or leave them out'
    )
