"""What is wrong with a data set: every problem, with its image and annotation and what is done about it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from PIL import Image

from mae_transfer.data.decode import decode_image
from mae_transfer.data.limits import UNREADABLE, check_pixels, reason
from mae_transfer.data.scan import Progress
from mae_transfer.errors import DataError

_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)  # values of the EXIF orientation that turn by a quarter
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = ("LA", "PA", "RGBA")
_OPEN_FILES = 8  # headers are waited for rather than computed


class Action(StrEnum):
    """What is done about a problem."""

    REFUSED = "refused"  # the data are not used until it is corrected
    LEFT_OUT = "left out"
    REPAIRED = "repaired"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        what: its kind, in the same words for every problem of the kind.
        detail: what was found, and what is done where the action alone does not say it.
        image, annotation: their ids, where there are such; the image's file where it is known.
    """

    action: Action
    what: str
    detail: str = ""
    image: Any = None
    file_name: str | None = None
    annotation: Any = None

    def __str__(self) -> str:
        place = []
        if self.image is not None:
            place.append(f"image {self.image}" + (f" ({self.file_name})" if self.file_name else ""))
        if self.annotation is not None:
            place.append(f"annotation {self.annotation}")
        return ": ".join([*([", ".join(place)] if place else []), self.what, *([self.detail] if self.detail else [])])


def summary(problems: Iterable[Problem]) -> list[str]:
    """A line for each kind of problem: how many there are, and the first of them."""
    first: dict[tuple[Action, str], Problem] = {}
    counts: Counter[tuple[Action, str]] = Counter()
    for problem in problems:
        kind = (problem.action, problem.what)
        first.setdefault(kind, problem)
        counts[kind] += 1
    return [
        f"{action}: {first[action, what]}" + (f" (and {count - 1} more of this kind)" if count > 1 else "")
        for (action, what), count in counts.items()
    ]


def refuse(problems: Sequence[Problem], data: str | Path) -> None:
    """Raises DataError, with the first of each kind, where a problem forbids using the data."""
    refused = [problem for problem in problems if problem.action is Action.REFUSED]
    if not refused:
        return
    lines = [line.removeprefix(f"{Action.REFUSED}: ") for line in summary(refused)]
    more = "" if len(refused) == 1 else "; tools/check_dataset.py lists them all"
    raise DataError(f"{data}: {'; '.join(lines)}{more}")


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What was found out about an image file.

    Attributes:
        height, width: upright; 0 where it cannot be read.
        mode: Pillow's name of how the pixels are stored; empty where it cannot be read.
        stored_turned: whether EXIF turns it by a quarter.
        fault: why it cannot be read, or None.
    """

    height: int = 0
    width: int = 0
    mode: str = ""
    stored_turned: bool = False
    fault: str | None = None


def look_at(path: str, *, decode: bool = False) -> ImageFacts:
    """Size and kind of an image file from its header, and whether it can be read.

    Files that do not end as their format does (JPEG and PNG), or whose pixels may have no 8-bit meaning, are decoded
    to see whether they can be read; with ``decode`` every file is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; sizes are checked below
            with Image.open(path) as image:
                (width, height), mode, kind = image.size, image.mode, image.format
                check_pixels(height, width, name=path)
                # For a PNG without the entry before its pixels, Pillow would decode them to look behind them.
                may_turn = kind != "PNG" or "exif" in image.info
                turned = may_turn and image.getexif().get(_ORIENTATION) in _SWAPS_SIDES
            if decode or mode not in _PLAIN_MODES or not _ends_well(path, kind):
                decode_image(path)
    except DataError as error:
        return ImageFacts(fault=str(error))
    except UNREADABLE as error:
        return ImageFacts(fault=f"cannot read image {path}: {reason(error)}")
    if turned:
        height, width = width, height
    return ImageFacts(height=height, width=width, mode=mode, stored_turned=turned)


def _ends_well(path: str, kind: str | None) -> bool:
    """Whether a file ends as its format does; cut-off ones do not. True for formats without a known ending."""
    if kind not in _ENDS:
        return True
    with Path(path).open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 64))
        return file.read().rstrip(b"\0\r\n").endswith(_ENDS[kind])


def look_at_all(paths: Sequence[str], *, decode: bool = False) -> list[ImageFacts]:
    """``look_at`` for many files at a time."""
    facts = []
    with ThreadPoolExecutor(_OPEN_FILES) as pool, Progress("checking images") as progress:
        for found in pool.map(lambda path: look_at(path, decode=decode), paths):
            facts.append(found)
            progress.add(1)
    return facts


def image_problems(record: dict[str, Any], facts: ImageFacts) -> list[Problem]:
    """What is wrong with the image file of a record in Detectron2's format."""
    name = record["file_name"]

    def problem(action: Action, what: str, detail: str) -> list[Problem]:
        return [Problem(action=action, what=what, detail=detail, image=record["image_id"], file_name=Path(name).name)]

    if facts.fault is not None:
        return problem(Action.REFUSED, "image that cannot be read", facts.fault)
    size, expected = (facts.height, facts.width), (record["height"], record["width"])
    if size != expected:
        how = " after the rotation that its EXIF entry asks for" if facts.stored_turned else ""
        return problem(
            Action.REFUSED,
            "image of another size than the json says",
            f"it is {size[1]}x{size[0]} pixels{how}, the json says {expected[1]}x{expected[0]}; correct the json, or "
            "store the image as it was annotated",
        )
    found: list[Problem] = []
    if facts.stored_turned:
        found += problem(Action.REPAIRED, "image that EXIF turns", "it is read upright, as the json has it")
    if facts.mode.startswith("I"):
        found += problem(Action.REPAIRED, "image of 16 bits", "the upper 8 bits of each value are used")
    elif facts.mode in _WITH_ALPHA:
        found += problem(Action.REPAIRED, "image with transparency", "it is dropped")
    elif facts.mode == "CMYK":
        found += problem(Action.REPAIRED, "image in CMYK", "it is converted to RGB without a colour profile")
    return found
