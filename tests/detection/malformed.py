"""Data as they should not be: each entry of REFUSED spoils generated scenes in one way, and says how it is reported.

REPAIRED holds what is not refused: the report says what is done, and training goes on.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Spoil = Callable[[Any], None]


def _entry(kind: str, number: int = 0, **changes: Any) -> Spoil:
    """Changes fields of an entry; None removes one."""

    def spoil(scenes: Any) -> None:
        entry = scenes.content[kind][number]
        for key, value in changes.items():
            entry.pop(key, None)
            if value is not None:
                entry[key] = value
        scenes.write()

    return spoil


def _outline(polygons: Any) -> Spoil:
    return _entry("annotations", segmentation=polygons)


def _boxed(polygons: Any, box: Any) -> Spoil:
    return _entry("annotations", segmentation=polygons, bbox=box)


def _rle(counts: Any) -> Spoil:
    return _entry("annotations", segmentation={"size": [48, 48], "counts": counts})


def _marked(scenes: Any) -> None:
    scenes.json.write_bytes(b"\xef\xbb\xbf" + scenes.json.read_bytes())


def _content(**changes: Any) -> Spoil:
    def spoil(scenes: Any) -> None:
        scenes.content.update(changes)
        scenes.write()

    return spoil


def _text(text: str | bytes) -> Spoil:
    return lambda scenes: scenes.json.write_bytes(text.encode() if isinstance(text, str) else text)


def _twice(kind: str) -> Spoil:
    def spoil(scenes: Any) -> None:
        scenes.content[kind].append(dict(scenes.content[kind][0]))
        scenes.write()

    return spoil


def _replaced(kind: str, value: Any) -> Spoil:
    def spoil(scenes: Any) -> None:
        scenes.content[kind][0] = value
        scenes.write()

    return spoil


def _first(scenes: Any) -> Path:
    path: Path = scenes.images / scenes.content["images"][0]["file_name"]
    return path


def _saved(image: Image.Image, ending: str = "png", size: tuple[int, int] | None = None, **options: Any) -> Spoil:
    """Stores another picture as the first image; ``size`` (width, height) is what the json shall say."""

    def spoil(scenes: Any) -> None:
        _first(scenes).unlink()
        name = f"other.{ending}"
        image.save(scenes.images / name, **options)
        entry = scenes.content["images"][0]
        entry["file_name"] = name
        if size is not None:
            entry["width"], entry["height"] = size
            scenes.content["annotations"] = [a for a in scenes.content["annotations"] if a["image_id"] != entry["id"]]
        scenes.write()

    return spoil


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(scenes: Any) -> None:
        path = _first(scenes)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _cut_jpeg(scenes: Any) -> None:
    _saved(_noise(), "jpg", quality=95)(scenes)
    path = scenes.images / "other.jpg"
    path.write_bytes(path.read_bytes()[:-500])


def _folder_for_image(scenes: Any) -> None:
    _first(scenes).unlink()
    _first(scenes).mkdir()


def _no_images(scenes: Any) -> None:
    for path in scenes.images.iterdir():
        path.unlink()
    scenes.images.rmdir()


def _noise(width: int = 48, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def _turned() -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


def _announcing(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header tells of another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _scrambled(data: bytes) -> bytes:
    """A PNG with whole header and ending, and noise for pixels."""
    start = data.index(b"IDAT") + 10
    return data[:start] + bytes(255 - byte for byte in data[start : start + 40]) + data[start + 40 :]


_RLE_SIZE = 48 * 48

REFUSED: dict[str, tuple[Spoil, str]] = {
    "no json": (lambda scenes: scenes.json.unlink(), "does not exist"),
    "empty json": (_text(""), "not readable as json"),
    "cut-off json": (lambda s: s.json.write_text(s.json.read_text()[:-40]), "not readable as json"),
    "json of bytes": (_text(b"\x89PNG\xff\xfe\x00"), "not readable as json"),
    "json too deep": (_text("[" * 100_000), "not readable as json"),
    "a list": (_text("[]"), "holds a list"),
    "a number": (_text("7"), "holds a int"),
    "no annotations": (lambda s: s.json.write_text(json.dumps({**s.content, "annotations": None})), "no list of ann"),
    "images by name": (_content(images={"a.png": {}}), "no list of images"),
    "no images listed": (_content(images=[]), "lists no images"),
    "no image folder": (_no_images, "image folder"),
    "no categories": (_content(categories=[]), "no categories"),
    "category twice": (_twice("categories"), "category id 7 is given twice"),
    "category id as text": (_entry("categories", id="7"), "category id that is no number: '7'"),
    "category without name": (_entry("categories", name=None), "incomplete category: it lacks name"),
    "image twice": (_twice("images"), "image id 0 is given twice"),
    "image that is a number": (_replaced("images", 5), "incomplete image"),
    "image without height": (_entry("images", height=None), "it lacks height"),
    "image of height 0": (_entry("images", height=0), "image size that is none"),
    "image height as text": (_entry("images", height="48"), "image size that is none: height '48'"),
    "image id as list": (_entry("images", id=[1]), "image id that is no number"),
    "image without file name": (_entry("images", file_name=None), "neither a file_name nor"),
    "file name of a kilobyte": (_entry("images", file_name="x" * 1000), "missing image file"),
    "file name with a zero byte": (_entry("images", file_name="a\0b.png"), "missing image file"),
    "image missing": (lambda scenes: _first(scenes).unlink(), "image 0: missing image file"),
    "folder for an image": (_folder_for_image, "missing image file"),
    "annotation that is null": (_replaced("annotations", None), "incomplete annotation"),
    "annotation without category": (_entry("annotations", category_id=None), "it lacks category_id"),
    "annotation of no image": (_entry("annotations", image_id=999), "annotation 1: annotation of an unknown image"),
    "annotation of image [0]": (_entry("annotations", image_id=[0]), "annotation of an unknown image"),
    "annotation of no category": (_entry("annotations", category_id=5), "it has category 5"),
    "iscrowd 2": (_entry("annotations", iscrowd=2), "iscrowd that is neither 0 nor 1"),
    "no outline": (_entry("annotations", segmentation=None), "annotation 1: annotation that has no segmentation"),
    "outline as text": (_entry("annotations", segmentation="1,2,3"), "neither polygons nor RLE"),
    "RLE without counts": (_entry("annotations", segmentation={"size": [48, 48]}), "RLE without size and counts"),
    "RLE of another size": (
        _entry("annotations", segmentation={"size": [48, 49], "counts": [0, 48 * 49]}),
        "its image is [48, 48]",
    ),
    "image cut off": (_bytes(lambda data: data[: len(data) // 2]), "image that cannot be read"),
    "JPEG cut off": (_cut_jpeg, "image that cannot be read"),
    "image without a byte": (_bytes(lambda data: b""), "image that cannot be read"),
    "text for an image": (_bytes(lambda data: b"<html>404</html>"), "no kind of image that Pillow knows"),
    "image of noise": (_bytes(_scrambled), "cannot read image"),  # seen when decoding only
    "image of a terapixel": (_bytes(lambda data: _announcing(data, 1_000_000, 1_000_000)), "could be decompression"),
    "image of another size": (_saved(_noise(40, 48)), "it is 40x48 pixels, the json says 48x48"),
    "image turned by EXIF": (
        _saved(_noise(60, 40), "jpg", (60, 40), **_turned()),
        "it is 40x60 pixels after the rotation that its EXIF entry asks for, the json says 60x40",
    ),
    "image of floats": (_saved(Image.new("F", (48, 48)), "tif"), "has float pixels"),
}

_FIRST = "image 0 (000.png), annotation 1"
_NO_NUMBERS = "annotation 1: outline that is no list of finite numbers"
_BAD_ID = "annotation id that is missing, 0, or given twice"

REPAIRED: dict[str, tuple[Spoil, str]] = {
    "two points": (_outline([[1, 1, 9, 9]]), f"left out: {_FIRST}: outline that has fewer than three points"),
    "odd": (_outline([[1, 1, 9, 9, 9, 1, 5]]), f"left out: {_FIRST}: outline that has an odd number"),
    "text": (_outline([["1", 1, 9, 9, 9, 1]]), _NO_NUMBERS),
    "points": (_outline([[[1, 1], [9, 9], [9, 1]]]), _NO_NUMBERS),
    "nan": (_outline([[float("nan"), 1, 9, 9, 9, 1]]), _NO_NUMBERS),
    "a line": (_outline([[1, 1, 5, 5, 9, 9]]), "annotation 1: outline that encloses no area"),
    "outside": (_outline([[60, 1, 70, 1, 70, 9]]), "annotation 1: outline that lies outside the image"),
    "far outside": (_outline([[1, 1, 1e9, 1, 9, 9]]), "reaches further outside the image than the image is large"),
    "one of two": (
        _boxed([[1, 1, 9, 9], [1, 1, 9, 9, 9, 1]], [1, 1, 8, 8]),
        f"repaired: {_FIRST}: polygon that has fewer than three points: the annotation's other",
    ),
    "half outside": (
        _boxed([[40, 40, 60, 40, 60, 60]], [40, 40, 20, 20]),
        "outline that reaches outside the image: it spans x 40 to 60 and y 40 to 60 of 48x48; the part inside is used",
    ),
    "flat": (_boxed([1, 1, 9, 9, 9, 1], [1, 1, 8, 8]), "polygon that is not in a list of polygons"),
    "short RLE": (_rle([0, 10]), "damaged RLE: its runs add up to 10, its image has 2304 pixels"),
    "negative RLE": (_rle([0, -10, 2314]), "damaged RLE: its counts cannot be read"),
    "RLE of text": (_rle("no RLE!"), "damaged RLE"),
    "RLE cut off": (_rle("P"), "damaged RLE"),
    "empty RLE": (_rle([_RLE_SIZE]), "RLE without a pixel"),
    "no box": (_boxed([[1, 1, 9, 9, 9, 1]], None), "annotation without a box: None; the outline's"),
    "flat box": (_boxed([[1, 1, 9, 9, 9, 1]], [1, 1, 0, 8]), "box that is none"),
    "box of corners": (
        _boxed([[10, 10, 20, 10, 20, 20]], [10, 10, 20, 20]),
        "box that disagrees with its outline: [10, 10, 20, 20]; the outline's is used, [10, 10, 10, ",
    ),
    "crowd without outline": (
        _entry("annotations", segmentation=None, iscrowd=1),
        "crowd region without outline: its box is used",
    ),
    "crowd of nothing": (
        _entry("annotations", segmentation=None, bbox=None, iscrowd=1),
        f"left out: {_FIRST}: crowd region without outline and box",
    ),
    "annotation id twice": (_entry("annotations", id=2), f"annotation 2: {_BAD_ID}"),
    "annotation id 0": (_entry("annotations", id=0), f"annotation 0: {_BAD_ID}"),
    "no annotation id": (_entry("annotations", id=None), _BAD_ID),
    "16 bits": (_saved(Image.fromarray(np.zeros((48, 48), np.uint16))), "image of 16 bits: the upper 8 bits"),
    "RGBA": (_saved(_noise().convert("RGBA")), "image with transparency: it is dropped"),
    "CMYK": (_saved(_noise().convert("CMYK"), "jpg"), "image in CMYK"),
    "turned as annotated": (
        _saved(_noise(60, 40), "jpg", (40, 60), **_turned()),
        "image that EXIF turns: it is read upright",
    ),
    "byte order mark": (_marked, "no problem"),
    "gray": (_saved(_noise().convert("L")), "no problem"),
    "palette": (_saved(_noise().quantize(8)), "no problem"),
}
