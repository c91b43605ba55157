"""The colours of classes: tables that a user gives, and colours for pictures where nobody says any."""

from __future__ import annotations

import colorsys
import csv
import json
import re
from pathlib import Path
from typing import Any

from mae_transfer.errors import DataError
from mae_transfer.segmentation.masks import Colour

_NUMBERS = re.compile(r"[\s,;:=\t()\[\]]+")
_HEX = re.compile(r"#[0-9a-fA-F]{6}")


def read_colours(path: str | Path) -> dict[str, Colour]:
    """The colour of every class, in the order of the file.

    A ``.txt`` has a class a line, ``R G B name`` or ``name R G B``; ``#RRGGBB`` may stand for the three numbers. A
    ``.csv`` has the columns name, r, g, b (or such names), in any order. A ``.json`` is ``{"name": [R, G, B]}`` or a
    list of ``{"name": …, "colour": …}``, as ``tools/predict.py`` writes beside its predictions.

    Raises:
        DataError: there is no such file, or it holds something else, a class twice, or a colour twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"dataset.colours {path} does not exist; give a .txt with R G B name a line, a .csv or a .json")
    readers = {".json": _from_json, ".csv": _from_csv, ".txt": _from_text}
    if path.suffix.lower() not in readers:
        raise DataError(f"dataset.colours {path} ends in {path.suffix or 'nothing'}; expected .txt, .csv or .json")
    try:
        entries = readers[path.suffix.lower()](path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.colours {path} is no text in UTF-8") from error
    if not entries:
        raise DataError(f"dataset.colours {path} lists no class")
    found: dict[str, Colour] = {}
    owner: dict[Colour, str] = {}
    for name, colour in entries:
        if name in found:
            raise DataError(f"dataset.colours {path} lists {name!r} twice")
        if colour in owner:
            raise DataError(f"dataset.colours {path} gives {owner[colour]!r} and {name!r} the same colour {colour}")
        found[name], owner[colour] = colour, name
    return found


def palette(num_classes: int) -> list[Colour]:
    """Distinct RGB colours, the same at every call: hues by the golden ratio, three brightnesses in turn."""
    colours = []
    for index in range(num_classes):
        hue = (0.05 + index * 0.618033988749895) % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.95)[index % 3], (0.95, 0.75, 0.6)[(index // 3) % 3])
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


Entries = list[tuple[str, Colour]]


def _from_text(text: str, path: str) -> Entries:
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or (line.lstrip().startswith("#") and not _HEX.match(line.lstrip())):
            continue
        where = f"line {number} of {path}"
        words = [word for word in _NUMBERS.split(line) if word]
        front = _parse(words[0]) if _HEX.fullmatch(words[0]) else _parse(words[:3])
        back = _parse(words[-1]) if _HEX.fullmatch(words[-1]) else _parse(words[-3:])
        if (front is None) == (back is None):
            raise DataError(
                f"{where} is {line.strip()!r}; expected R G B name, or name R G B, with R, G, B from 0 to 255"
            )
        taken = 1 if _HEX.fullmatch(words[0] if front else words[-1]) else 3
        name = " ".join(words[taken:] if front else words[:-taken])
        entries.append(_entry(name, front or back, where))
    return entries


def _from_csv(text: str, path: str) -> Entries:
    rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    columns = {(name or "").strip().lower(): name for name in (rows[0] if rows else {})}
    chosen = [
        next((columns[name] for name in names if name in columns), None)
        for names in (("name", "class", "label", "class_name"), ("r", "red"), ("g", "green"), ("b", "blue"))
    ]
    if rows and None in chosen:
        raise DataError(f"{path} has the columns {', '.join(columns)}; expected name, r, g, b")
    name, *channels = chosen
    return [
        _entry(
            (row[name] or "").strip(),
            _parse([(row[channel] or "").strip() for channel in channels]),
            f"row {n} of {path}",
        )
        for n, row in enumerate(rows, 1)
    ]


def _from_json(text: str, path: str) -> Entries:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict):
        return [_entry(name, _parse(colour), f"{name!r} in {path}") for name, colour in content.items()]
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        return [
            _entry(entry.get("name"), _parse(entry.get("colour", entry.get("color"))), f"entry {number} of {path}")
            for number, entry in enumerate(content)
        ]
    raise DataError(f'{path} holds no colours; expected {{"building": [128, 0, 0], …}}')


def _entry(name: Any, colour: Colour | None, where: str) -> tuple[str, Colour]:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} names no class; expected a name and its colour")
    if colour is None:
        raise DataError(f"{where} holds no colour; expected three whole numbers from 0 to 255, or #RRGGBB")
    return name, colour


def _parse(value: Any) -> Colour | None:
    """A colour from three numbers or a text of them; None where it is none."""
    if isinstance(value, str):
        if _HEX.fullmatch(value):
            return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
        value = [word for word in _NUMBERS.split(value) if word]
    if not isinstance(value, list) or len(value) != 3:
        return None
    numbers = [int(v) if isinstance(v, str) and v.isdecimal() else v for v in value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in numbers):
        return None
    return numbers[0], numbers[1], numbers[2]
