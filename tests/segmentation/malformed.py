"""Data as they should not be: each entry of REFUSED spoils a folder of boxes in one way, and says how it is reported.

REPAIRED holds what is not refused: the report says what is done, and training goes on.
"""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (48, 64)  # of the images, (H, W)

Spoil = Callable[[Path], Any]


@dataclass(frozen=True, kw_only=True)
class Spoilt:
    """How a folder is spoilt, what the report says, and the dataset.* settings that it is read by."""

    spoil: Spoil
    message: str
    options: dict[str, str] = field(default_factory=dict)


def bad(spoil: Spoil, message: str, **options: str) -> Spoilt:
    return Spoilt(spoil=spoil, message=message, options=options)


def image(root: Path, number: int = 1) -> Path:
    return root / f"images/training/scene_{number}.png"


def mask(root: Path, number: int = 1) -> Path:
    return root / f"annotations/training/scene_{number}.png"


def masks(root: Path) -> list[Path]:
    return sorted((root / "annotations").glob("*/*.png"))


def remove(name: str) -> Spoil:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def emptied(name: str) -> Spoil:
    return lambda root: [path.unlink() for path in (root / name).iterdir()]


def labels(change: Callable[[np.ndarray], np.ndarray], every: bool = False, **options: Any) -> Spoil:
    """Stores other labels in one mask, or in every one."""

    def spoil(root: Path) -> None:
        for path in masks(root) if every else [mask(root)]:
            Image.fromarray(change(np.array(Image.open(path)))).save(path, format="PNG", **options)

    return spoil


def replaced(
    which: Callable[[Path], Path], picture: Callable[[], Image.Image], kind: str = "PNG", **more: Any
) -> Spoil:
    """Stores another picture under the file's name, whatever its kind."""
    return lambda root: picture().save(which(root), format=kind, **more)


def data(which: Callable[[Path], Path], change: Callable[[bytes], bytes]) -> Spoil:
    return lambda root: which(root).write_bytes(change(which(root).read_bytes()))


def classes(text: str | bytes, name: str = "classes.txt") -> Spoil:
    return lambda root: (root / name).write_bytes(text.encode() if isinstance(text, str) else text)


def both(*spoils: Spoil) -> Spoil:
    return lambda root: [spoil(root) for spoil in spoils]


TABLE = "40 40 40 ground\n220 60 60 red\n60 200 80 green\n70 90 230 blue\n0 0 0 void\n"
COLOURS = np.array([(40, 40, 40), (220, 60, 60), (60, 200, 80), (70, 90, 230)], np.uint8)
painted = labels(lambda found: COLOURS[found], every=True)


def coloured(*spoils: Spoil, table: str = TABLE) -> Spoil:
    """Every mask in colours, and a table of them."""
    return both(painted, classes(table, "colours.txt"), *spoils)


black_and_white = labels(lambda found: np.where(found > 0, 255, 0).astype(np.uint8), every=True)


def two_of_one_name(root: Path) -> None:
    shutil.copy(image(root), image(root).with_suffix(".jpg"))


def folder_for(which: Callable[[Path], Path]) -> Spoil:
    def spoil(root: Path) -> None:
        which(root).unlink()
        which(root).mkdir()

    return spoil


def dangling(root: Path) -> None:
    image(root).unlink()
    image(root).symlink_to(root / "nowhere.png")


def as_jpeg(paths: Callable[[Path], Sequence[Path]]) -> Spoil:
    def spoil(root: Path) -> None:
        for path in paths(root):
            Image.open(path).save(path.with_suffix(".jpg"))
            path.unlink()

    return spoil


def one_bit(root: Path) -> None:
    for path in masks(root):
        Image.fromarray(np.array(Image.open(path)) > 0).save(path)


def palette_files(*colours: Sequence[int]) -> Spoil:
    """Masks as palette files, each of its own colours, in turn."""

    def spoil(root: Path) -> None:
        for number, path in enumerate(masks(root)):
            picture = Image.fromarray(np.array(Image.open(path)), mode="P")
            picture.putpalette(list(colours[number % len(colours)]))
            picture.save(path)

    return spoil


def noise(width: int = SIZE[1], height: int = SIZE[0]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def turned(width: int, height: int) -> Spoil:
    """An image that its EXIF entry turns by a quarter, stored in width x height."""

    def spoil(root: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image(root).unlink()
        noise(width, height).save(image(root).with_suffix(".jpg"), exif=exif)

    return spoil


def announcing(content: bytes, width: int = 1_000_000, height: int = 1_000_000) -> bytes:
    """A PNG whose header tells of another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def scrambled(content: bytes) -> bytes:
    """A PNG with whole header and ending, and noise for pixels."""
    start = content.index(b"IDAT") + 10
    return content[:start] + bytes(255 - byte for byte in content[start : start + 40]) + content[start + 40 :]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def smoothed(root: Path) -> None:
    picture = Image.open(mask(root))
    picture.resize((20, 15)).resize(picture.size, Image.Resampling.BICUBIC).save(mask(root))


IN_COLOUR = {"colours": "ROOT/colours.txt"}

REFUSED: dict[str, Spoilt] = {
    # Folders
    "no annotations": bad(remove("annotations/training"), "has no annotations/training/"),
    "no validation": bad(remove("annotations/validation"), "has no annotations/validation/"),
    "other split": bad(lambda root: None, "has no annotations/train/", train_split="train"),
    "no images": bad(remove("images"), "neither images/training/ nor images/"),
    "empty images": bad(emptied("images/training"), "no images in"),
    "empty annotations": bad(emptied("annotations/training"), "no masks in"),
    "masks as JPEG": bad(as_jpeg(masks), "It holds .jpg: save masks as PNG"),
    "one mask as JPEG": bad(as_jpeg(lambda root: [mask(root)]), "scene_1.jpg is none: masks are PNG files"),
    "mask missing": bad(lambda root: mask(root).unlink(), "scene_1.png: image without a mask: add one in"),
    "image missing": bad(lambda root: image(root).unlink(), "scene_1.png: mask without an image"),
    "two of one name": bad(two_of_one_name, "two files of one name: scene_1.jpg and scene_1.png"),
    # Classes
    "no list of classes": bad(lambda root: None, "names.txt does not exist", classes="ROOT/names.txt"),
    "empty list of classes": bad(classes("\n \n"), "names no class"),
    "class twice": bad(classes("red\nred\n"), "names a class twice: red"),
    "classes in bytes": bad(classes(b"\xff\xfe\x00"), "is no text in UTF-8"),
    "classes as object": bad(classes("{}", "c.json"), "holds no list of names", classes="ROOT/c.json"),
    "classes cut off": bad(classes('["a", ', "c.json"), "is not JSON", classes="ROOT/c.json"),
    "classes too deep": bad(classes("[" * 100_000, "c.json"), "is not JSON", classes="ROOT/c.json"),
    "too many classes": bad(classes("\n".join(f"c{n}" for n in range(300))), "names 300 classes; masks have room for"),
    "too few classes": bad(classes("ground\nred\n"), "label of no class: 2 (192 pixels), 3 "),
    "nothing labelled": bad(
        both(remove("classes.txt"), labels(lambda found: np.full_like(found, 255), every=True)), "leaves no class"
    ),
    # Images
    "image cut off": bad(data(image, half), "image that cannot be read"),
    "image without a byte": bad(data(image, lambda content: b""), "image that cannot be read"),
    "text for an image": bad(data(image, lambda content: b"<html>"), "no kind of image that Pillow knows"),
    "folder for an image": bad(folder_for(image), "image that cannot be read"),
    "dangling link": bad(dangling, "image that cannot be read"),
    "image of a terapixel": bad(data(image, announcing), "could be decompression"),
    "image of floats": bad(replaced(image, lambda: Image.new("F", SIZE[::-1]), "TIFF"), "has float pixels"),
    "image of noise": bad(data(image, scrambled), "cannot read image"),  # seen when decoding only
    # Masks
    "mask cut off": bad(data(mask, half), "mask that cannot be read"),
    "mask without a byte": bad(data(mask, lambda content: b""), "mask that cannot be read"),
    "text for a mask": bad(data(mask, lambda content: b"hello"), "no kind of image that Pillow knows"),
    "mask of noise": bad(data(mask, scrambled), "mask that cannot be read"),
    "mask of a terapixel": bad(data(mask, announcing), "could be decompression"),
    "folder for a mask": bad(folder_for(mask), "mask that cannot be read"),
    "mask of another size": bad(
        labels(lambda found: found[:-2]), "it is 64x46 pixels, the image 64x48; correct it, or let it be resized"
    ),
    "mask of other proportions": bad(labels(lambda found: found[:20]), "has other proportions", mask_size="resize"),
    "mask on its side": bad(labels(lambda found: found.T.copy()), "the one lies on its side", mask_size="resize"),
    "image turned by EXIF": bad(turned(64, 48), "it is 64x48 pixels, the image 48x64; the one lies on its side"),
    "mask in colours": bad(painted, "mask that holds colours: 3 channels; expected a number a pixel: give dataset.col"),
    "mask in equal channels": bad(labels(lambda found: np.stack([found] * 3, -1)), "its channels are equal: save one"),
    "mask with transparency": bad(
        replaced(mask, lambda: Image.new("RGBA", SIZE[::-1], (0, 0, 0, 9))), "mask with transparency"
    ),
    "mask of 16 bits": bad(labels(lambda found: found.astype(np.uint16) * 300), "label that is none: 900; labels up"),
    "mask of floats": bad(
        replaced(mask, lambda: Image.new("F", SIZE[::-1]), "TIFF"), "mask of float pixels: expected whole numbers"
    ),
    "label of no class": bad(
        labels(lambda found: np.where(found == 3, 7, found).astype(np.uint8)),
        "label of no class: 7 (256 pixels); the 4 classes are labelled 0 to 3 (255 is ignored)",
    ),
    "zero label": bad(labels(lambda found: found + 1), "where 0 is unlabelled, give dataset.reduce_zero_label=True"),
    "black and white": bad(black_and_white, "binary mask saved as black and white: the only values are 0 and 255"),
    "one bit": bad(one_bit, "binary mask saved as black and white"),
    "palettes that disagree": bad(
        palette_files([0] * 3 + [9] * 765, [0] * 3 + [8] * 765),
        "1 is (9, 9, 9) in scene_0.png and (8, 8, 8) here; give dataset.masks=index where the numbers count",
    ),
    # Masks in colours
    "no table": bad(painted, "colours.txt does not exist", **IN_COLOUR),
    "table of words": bad(coloured(table="red is red\n"), "expected R G B name, or name R G B", **IN_COLOUR),
    "colour beyond 255": bad(coloured(table="0 0 256 red\n"), "expected R G B name, or name R G B", **IN_COLOUR),
    "colour of two classes": bad(
        coloured(table=TABLE + "70 90 230 sea\n"), "gives 'blue' and 'sea' the same colour", **IN_COLOUR
    ),
    "class without colour": bad(coloured(classes("ground\nsky\n")), "has no colour for sky", **IN_COLOUR),
    "unknown colour": bad(
        coloured(table=TABLE.replace("220 60 60", "220 60 61")), "colour of no class: (220, 60, 60) (", **IN_COLOUR
    ),
    "smoothed colours": bad(coloured(smoothed), "so many come from smoothing or JPEG", **IN_COLOUR),
    # Masks in black and white
    "gray among black and white": bad(
        both(classes("a\nb\n"), black_and_white, smoothed), "gray pixels", masks="binary"
    ),
    "colours for black and white": bad(both(classes("a\nb\n"), painted), "expected black and white", masks="binary"),
    "three classes in two": bad(both(classes("a\nb\nc\n"), black_and_white), "have two, black first", masks="binary"),
}

REPAIRED: dict[str, Spoilt] = {
    "turned as annotated": bad(turned(48, 64), "image that EXIF turns: it is read upright"),
    "16 bits": bad(
        replaced(image, lambda: Image.fromarray(np.zeros(SIZE, np.uint16))), "image of 16 bits: the upper 8 bits"
    ),
    "RGBA": bad(replaced(image, lambda: noise().convert("RGBA")), "image with transparency: it is dropped"),
    "CMYK": bad(replaced(image, lambda: noise().convert("CMYK"), "JPEG"), "image in CMYK"),
    "gray": bad(replaced(image, lambda: noise().convert("L")), "no problem"),
    "palette": bad(replaced(image, lambda: noise().quantize(8)), "no problem"),
    "resized": bad(
        labels(lambda found: found.repeat(2, 0).repeat(2, 1)),
        "it is 128x96 pixels, the image 64x48; it is resized by nearest neighbour",
        mask_size="resize",
    ),
    "byte order mark": bad(classes(b"\xef\xbb\xbfground\nred\ngreen\nblue\n"), "no problem"),
    "hidden file": bad(lambda root: (root / "images/training/._scene_0.png").write_text("Finder"), "no problem"),
    "a mask without a label": bad(labels(lambda found: np.full_like(found, 255)), "no problem"),
    "palette masks": bad(palette_files([0, 0, 0, 9, 9, 9] + [7] * 762), "no problem"),
    "palettes that need not agree": bad(palette_files([1] * 768, [2] * 768), "no problem", masks="index"),
    "colours": bad(coloured(), "no problem", **IN_COLOUR),
    "palettes as colours": bad(
        both(palette_files([*COLOURS.ravel(), *[7] * 756]), classes(TABLE, "colours.txt")), "no problem", **IN_COLOUR
    ),
    "black and white as such": bad(both(remove("classes.txt"), black_and_white), "no problem", masks="binary"),
    "0 and 1": bad(both(remove("classes.txt"), labels(np.sign, every=True)), "no problem", masks="binary"),
    "one bit as such": bad(both(remove("classes.txt"), one_bit), "no problem", masks="binary"),
}
