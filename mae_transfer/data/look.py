"""What the header of an image file tells, and whether the file can be read: for checks before a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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


def storage_notes(facts: ImageFacts) -> list[tuple[str, str]]:
    """What is unusual in how a file stores its pixels, and how it is read all the same: (kind, what is done) each."""
    found = []
    if facts.stored_turned:
        found.append(("image that EXIF turns", "it is read upright"))
    if facts.mode.startswith("I"):
        found.append(("image of 16 bits", "the upper 8 bits of each value are used"))
    elif facts.mode in _WITH_ALPHA:
        found.append(("image with transparency", "it is dropped"))
    elif facts.mode == "CMYK":
        found.append(("image in CMYK", "it is converted to RGB without a colour profile"))
    return found
