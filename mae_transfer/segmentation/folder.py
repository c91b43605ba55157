"""A folder in ADE20K's layout: what is in it, and whether it can be trained on.

Two layouts are read::

    ROOT/images/{training,validation}/NAME.jpg     ROOT/images/NAME.jpg
    ROOT/annotations/{training,validation}/NAME.png

Masks are index PNGs (grayscale or palette), of the size of their image as it is displayed. Nothing here needs
MMSegmentation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mae_transfer.errors import ConfigError, DataError

IGNORE = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_CHECKED_MASKS = 2000  # pixel values are looked at in at most this many masks before training, and in each when read
_EXIF_ORIENTATION = 0x0112
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path


def find_pairs(root: str | Path, split: str) -> list[Pair]:
    """Every mask of a split with its image, sorted by name.

    Raises:
        DataError: a folder is missing or empty, a mask has no image, or an image of the split has no mask.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"dataset.root {root} is not a folder; give the folder that holds images/ and annotations/")
    masks_at = root / "annotations" / split
    if not masks_at.is_dir():
        raise DataError(
            f"{root} has no annotations/{split}/; expected ADE20K's layout: {_expected(split)}{_seen(root)}"
        )
    images_at = root / "images" / split
    flat = not images_at.is_dir()
    if flat:
        images_at = root / "images"
    if not images_at.is_dir():
        raise DataError(f"{root} has neither images/{split}/ nor images/; expected ADE20K's layout: {_expected(split)}")
    images = _by_stem(images_at, IMAGE_SUFFIXES)
    masks = _by_stem(masks_at, (".png",))
    if not images:
        raise DataError(f"no images in {images_at}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    if not masks:
        raise DataError(f"no masks in {masks_at}; expected a PNG for every image, of the same name")
    lonely = sorted(set(masks) - set(images))
    if lonely:
        raise DataError(f"{_some(lonely, 'annotation')} in {masks_at} without an image of that name in {images_at}")
    bare = sorted(set(images) - set(masks))
    if bare and not flat:
        raise DataError(
            f"{_some(bare, 'image')} in {images_at} without a mask in {masks_at}; add the masks or move the images"
        )
    return [Pair(image=images[stem], mask=masks[stem]) for stem in sorted(masks)]


def read_classes(root: str | Path, classes: str | None, *, splits: Sequence[str], reduce_zero_label: bool) -> list[str]:
    """Class names, in the order of their labels.

    Args:
        root: the data set's folder.
        classes: a .txt with a name a line, or a .json with a list of names; None means ROOT/classes.txt where it
            exists, and otherwise "class 0", "class 1" … up to the highest label in the masks.
        splits: looked through for labels where there is no list.
        reduce_zero_label: label 0 is no class.

    Raises:
        DataError: the list is missing, empty or of another form.
    """
    path = Path(classes) if classes is not None else Path(root) / "classes.txt"
    if classes is None and not path.is_file():
        return _classes_from_masks(root, splits, reduce_zero_label=reduce_zero_label)
    if not path.is_file():
        raise DataError(f"dataset.classes {path} does not exist; give a .txt with a class name a line, or a .json list")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f'{path} holds no list of names; expected ["building", "car", …]')
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path} names no class")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} names a class twice: {', '.join(repeated)}")
    return names


def check_folder(root: str | Path, *, split: str, num_classes: int, reduce_zero_label: bool) -> str:
    """Look through a split and say what is in it.

    Sizes are compared for every pair; pixel values in at most ``MAX_CHECKED_MASKS`` masks, evenly spread (the rest
    is checked when read in training).

    Returns:
        A line for the log.

    Raises:
        DataError: images that cannot be opened, masks of another size than their image, that are no index PNGs,
            or whose labels do not fit the classes.
    """
    pairs = find_pairs(root, split)
    with ThreadPoolExecutor(max_workers=4) as pool:
        sizes = list(pool.map(_size_problem, pairs))
        problems = [problem for problem in sizes if problem]
        if problems:
            raise DataError(_list(problems, f"{len(problems)} of {len(pairs)} pairs in {root} ({split}) do not fit"))
        step = max(1, -(-len(pairs) // MAX_CHECKED_MASKS))
        looked_at = pairs[::step]
        counts = list(pool.map(lambda pair: np.bincount(read_mask(pair.mask).ravel(), minlength=256), looked_at))
    total = np.sum(counts, axis=0)
    labels = np.flatnonzero(total)
    if set(labels) == {0, 255} or set(labels) == {255}:
        raise DataError(
            f"the masks in {root} ({split}) hold only the values {', '.join(map(str, labels))}: a binary mask saved as "
            "black and white? 255 means 'ignored' here. Save them with labels 0 and 1, and train with "
            "dataset.reduce_zero_label=False"
        )
    for pair, count in zip(looked_at, counts, strict=True):
        check_labels(np.flatnonzero(count), pair.mask, num_classes=num_classes, reduce_zero_label=reduce_zero_label)
    present = np.flatnonzero(total[: num_classes + reduce_zero_label])
    ignored = (total[IGNORE] + (total[0] if reduce_zero_label else 0)) / total.sum()
    return (
        f"{split}: {len(pairs)} images, {len([label for label in present if label or not reduce_zero_label])} of "
        f"{num_classes} classes occur, {ignored:.1%} of the pixels are unlabelled"
        + (f" (values of {len(looked_at)} masks looked at)" if step > 1 else "")
    )


def read_mask(path: str | Path) -> np.ndarray:
    """An index PNG (grayscale, 1-bit, 16-bit or palette) as (H, W) labels, before any reduction.

    Raises:
        DataError: the file cannot be read, or holds colours rather than labels, or labels above 255.
    """
    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("L") if image.mode == "1" else image)  # 1-bit becomes 0 and 255
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"mask {path} cannot be read: {error}") from error
    if array.ndim != 2:
        raise DataError(
            f"mask {path} holds colours ({array.shape[2]} channels); expected an index PNG with one label a pixel"
        )
    if array.max(initial=0) > IGNORE:
        raise DataError(f"mask {path} holds label {array.max()}; labels up to 254 are possible, 255 is ignored")
    return array.astype(np.uint8)


def reduce_labels(labels: np.ndarray) -> np.ndarray:
    """0 becomes 255 (ignored), 1 becomes 0 …; 255 stays."""
    return np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1).astype(np.uint8)


def check_labels(labels: np.ndarray, path: str | Path, *, num_classes: int, reduce_zero_label: bool) -> None:
    """Raise where a mask (as stored) holds labels that no class has.

    Raises:
        DataError: naming the file, the labels and what the classes allow.
    """
    highest = num_classes if reduce_zero_label else num_classes - 1
    wrong = sorted({int(label) for label in np.unique(labels) if highest < label < IGNORE})
    if not wrong:
        return
    first = 1 if reduce_zero_label else 0
    hint = ""
    if not reduce_zero_label and wrong == [num_classes]:
        hint = "; if 0 means unlabelled, train with dataset.reduce_zero_label=True"
    raise DataError(
        f"mask {path} holds label {', '.join(map(str, wrong[:_SHOWN]))}, but the {num_classes} classes are labelled "
        f"{first} to {highest}{' with 0 unlabelled' if reduce_zero_label else ''} (255 is ignored): correct the mask "
        f"or dataset.classes{hint}"
    )


def displayed_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image as it is displayed and loaded, after its EXIF rotation.

    Raises:
        DataError: the file is no readable image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"image {path} cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


def _size_problem(pair: Pair) -> str | None:
    try:
        image = displayed_size(pair.image)
        with Image.open(pair.mask) as mask:
            size = mask.size
    except DataError as error:
        return str(error)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        return f"mask {pair.mask} cannot be read: {error}"
    if size == image:
        return None
    return f"{pair.mask.name} is {size[0]}x{size[1]}, its image {image[0]}x{image[1]}"


def _classes_from_masks(root: str | Path, splits: Sequence[str], *, reduce_zero_label: bool) -> list[str]:
    masks = [pair.mask for split in splits for pair in find_pairs(root, split)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        labels = set().union(*pool.map(lambda path: set(np.unique(read_mask(path)).tolist()), masks))
    first = 1 if reduce_zero_label else 0
    highest = max((label for label in labels if label != IGNORE), default=-1)
    if highest < first:
        raise ConfigError(
            f"the masks in {root} hold no label but {', '.join(map(str, sorted(labels)))}; with "
            f"dataset.reduce_zero_label={reduce_zero_label} that leaves no class"
        )
    return [f"class {label}" for label in range(first, highest + 1)]


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            raise DataError(f"{folder} holds two files for {path.stem}: {found[path.stem].name} and {path.name}")
        found[path.stem] = path
    return found


def _some(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _list(problems: Sequence[str], headline: str) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{headline}:{shown}{more}"


def _expected(split: str) -> str:
    return f"images/{split}/NAME.jpg (or images/NAME.jpg) and annotations/{split}/NAME.png"


def _seen(root: Path) -> str:
    folders = sorted(str(path.relative_to(root)) for path in root.glob("*/*") if path.is_dir())[:8]
    return f". There are: {', '.join(folders)}" if folders else ""
