"""Which mask belongs to which image, in a folder of ADE20K's layout or in that of a published data set.

Two layouts are read for any folder::

    ROOT/images/{training,validation}/NAME.jpg     ROOT/images/NAME.jpg
    ROOT/annotations/{training,validation}/NAME.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_transfer.data.problems import Action, Problem
from mae_transfer.errors import DataError
from mae_transfer.segmentation.names import Layout

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_SHOWN_FOLDERS = 8


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its mask, and the name that they share."""

    name: str
    image: Path
    mask: Path


def pair_folder(root: Path, split: str) -> tuple[list[Pair], list[Problem]]:
    """The pairs of a split of a folder in ADE20K's layout, by name, and what has no partner.

    Raises:
        DataError: a folder is missing or empty.
    """
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
    images, problems = _by_stem(images_at, IMAGE_SUFFIXES)
    masks, problems_of_masks = _by_stem(masks_at, (".png",))
    if not images:
        raise DataError(f"no images in {images_at}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    if not masks:
        raise DataError(f"no masks in {masks_at}; expected a PNG for every image, of the same name{_others(masks_at)}")
    # Flat images are of every split: those that the split has no mask of are not its.
    names = masks if flat else {**images, **masks}
    problems += problems_of_masks
    return _pair(sorted(names), images, masks, problems, images_at=images_at, masks_at=[masks_at])


def pair_layout(root: Path, split: str, layout: Layout) -> tuple[list[Pair], list[Problem]]:
    """As ``pair_folder``, of a published data set; a ``split`` of several lists joins them by "+".

    Raises:
        DataError: a folder or list is missing or empty.
    """
    folder, ending = layout.images
    images_at = root / folder.format(split=split)
    masks_at = list(dict.fromkeys(root / name.format(split=split) for name, _ in layout.masks))
    if not images_at.is_dir():
        raise DataError(f"{root} has no {folder.format(split=split)}/ with images NAME{ending}{_seen(root)}")
    if not any(path.is_dir() for path in masks_at):
        raise DataError(f"{root} has no {' or '.join(str(path.relative_to(root)) for path in masks_at)}/{_seen(root)}")
    images = _below(images_at, [ending])
    masks: dict[str, Path] = {}
    for path, (name, _) in zip(
        (root / name.format(split=split) for name, _ in layout.masks), layout.masks, strict=True
    ):
        endings = [end for other, end in layout.masks if other == name]
        if path.is_dir():
            masks = {**_below(path, endings), **masks}
    if layout.names is None:
        names = sorted({**images, **masks})
    else:
        names = _listed(root, split, layout.names)
    if not images:
        raise DataError(f"no images in {images_at}; expected files ending in {ending}")
    if not masks:
        endings = list(dict.fromkeys(end for _, end in layout.masks))
        raise DataError(f"no masks in {masks_at[0]}; expected files ending in {' or '.join(endings)}")
    return _pair(names, images, masks, [], images_at=images_at, masks_at=masks_at)


def _pair(
    names: Sequence[str],
    images: dict[str, Path],
    masks: dict[str, Path],
    problems: list[Problem],
    *,
    images_at: Path,
    masks_at: Sequence[Path],
) -> tuple[list[Pair], list[Problem]]:
    pairs = []
    for name in names:
        image, mask = images.get(name), masks.get(name)
        if image is not None and mask is not None:
            pairs.append(Pair(name=name, image=image, mask=mask))
        elif image is not None:
            other = next((path for at in masks_at for path in sorted(at.glob(f"{_escape(name)}.*"))), None)
            hint = f"; {other.name} is none: masks are PNG files, others lose labels" if other is not None else ""
            problems.append(_refused("image without a mask", f"add one in {masks_at[0]}{hint}", image=image))
        elif mask is not None:
            problems.append(_refused("mask without an image", f"expected one of its name in {images_at}", mask=mask))
        else:
            detail = f"{name} is listed, but neither in {images_at} nor in {masks_at[0]}"
            problems.append(_refused("name without image and mask", detail))
    return pairs, problems


def _listed(root: Path, split: str, where: str) -> list[str]:
    """Names from the lists of a split."""
    names: dict[str, None] = {}
    for part in split.split("+"):
        path = root / where.format(split=part)
        if not path.is_file():
            raise DataError(f"{path} does not exist; expected the list of names of the split {part!r}, one a line")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no text in UTF-8") from error
        names |= dict.fromkeys(line.strip() for line in lines if line.strip())
    if not names:
        raise DataError(f"{root / where.format(split=split)} lists no name")
    return list(names)


def _below(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Files below a folder by what they are called before their ending, of which the first that fits counts."""
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.rglob("*")):
        rank = next((number for number, ending in enumerate(endings) if path.name.endswith(ending)), None)
        if rank is None or path.name.startswith("."):
            continue
        name = str(path.relative_to(folder))[: -len(endings[rank])]
        if name not in found or rank < found[name][0]:
            found[name] = (rank, path)
    return {name: path for name, (_, path) in found.items()}


def _by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[Problem]]:
    found: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            detail = f"{found[path.stem].name} and {path.name} in {folder}; remove one"
            problems.append(_refused("two files of one name", detail))
            continue
        found[path.stem] = path
    return found, problems


def _refused(what: str, detail: str, *, image: Path | None = None, mask: Path | None = None) -> Problem:
    return Problem(
        action=Action.REFUSED,
        what=what,
        detail=detail,
        file_name=None if image is None else str(image),
        mask=None if mask is None else str(mask),
    )


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _expected(split: str) -> str:
    return f"images/{split}/NAME.jpg (or images/NAME.jpg) and annotations/{split}/NAME.png"


def _others(folder: Path) -> str:
    """What a folder without masks holds instead."""
    endings = sorted({path.suffix.lower() for path in folder.iterdir() if path.is_file() and path.suffix})
    return f". It holds {', '.join(endings)}: save masks as PNG, others lose labels" if endings else ""


def _seen(root: Path) -> str:
    folders = sorted(str(path.relative_to(root)) for path in root.glob("*/*") if path.is_dir())[:_SHOWN_FOLDERS]
    return f". There are: {', '.join(folders)}" if folders else ""
