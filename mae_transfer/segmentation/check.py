"""What is in a split of a data set, and what is wrong with it: every image, every mask, every pixel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from mae_transfer.data.limits import UNREADABLE
from mae_transfer.data.look import ImageFacts, look_at, storage_notes
from mae_transfer.data.problems import Action, Problem, refuse
from mae_transfer.data.scan import Progress
from mae_transfer.segmentation.folder import Pair
from mae_transfer.segmentation.masks import IGNORE, Colour, Looked, MaskReader
from mae_transfer.segmentation.source import Split

MAX_CHECKED_MASKS = 2000  # before training, pixels are looked at in at most this many masks, and in each when read
_OPEN_FILES = 4


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in a split.

    Attributes:
        pairs: that can be used as far as their names tell.
        pixels: of each class, and last the unlabelled ones, in the masks looked at.
        images: masks in which each class occurs.
        num_looked_at: masks whose pixels were looked at.
        notes: what is not wrong, but may be meant otherwise.
    """

    split: Split
    classes: tuple[str, ...]
    pairs: list[Pair] = field(repr=False)
    problems: list[Problem] = field(repr=False)
    pixels: np.ndarray
    images: np.ndarray
    num_looked_at: int
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """A line on what is there."""
        total = max(int(self.pixels.sum()), 1)
        part = "" if self.num_looked_at == len(self.pairs) else f" (pixels of {self.num_looked_at} masks looked at)"
        kinds = Counter(
            f"{problem.what}, {problem.action}" for problem in self.problems if problem.action is not Action.REFUSED
        )
        return "; ".join(
            [
                f"{self.split.split}: {len(self.pairs)} images, {int((self.images > 0).sum())} of {len(self.classes)} "
                f"classes occur, {self.pixels[-1] / total:.1%} of the pixels are unlabelled{part}",
                *(f"{count} x {kind}" for kind, count in kinds.items()),
                *self.notes,
            ]
        )

    def table(self) -> str:
        """A line for each class: its number in masks, its share of the pixels, and the images that it occurs in."""
        first = int(self.split.reduce_zero_label)
        numbered = self.split.masks != "colours" and not (self.split.published and self.split.published.numberings)
        total = max(int(self.pixels.sum()), 1)
        width = max(map(len, (*self.classes, "unlabelled")))
        rows = [
            f"  {str(first + label) if numbered else '':>3} {name:<{width}} {self.pixels[label] / total:8.3%} "
            f"in {self.images[label]} images"
            for label, name in enumerate(self.classes)
        ]
        return "\n".join([*rows, f"      {'unlabelled':<{width - 1}} {self.pixels[-1] / total:8.3%}"])


def check_split(split: Split, classes: Sequence[str], *, every: bool = True, decode: bool = True) -> Report:
    """Look through a split.

    Args:
        every: look at the pixels of all masks, rather than of at most ``MAX_CHECKED_MASKS``, evenly spread; the sizes
            of all are compared in any case.
        decode: decode every image, rather than look at its header and ending.

    Raises:
        DataError: a folder or list is missing or empty, or the colours cannot be read.
    """
    pairs, problems = split.scan()
    reader = split.reader(classes)
    step = 1 if every else max(1, -(-len(pairs) // MAX_CHECKED_MASKS))
    pixels, images = np.zeros(len(classes) + 1, np.int64), np.zeros(len(classes), np.int64)
    stored = np.zeros(256, np.int64)
    shown: dict[int, dict[Colour, Path]] = {}
    with ThreadPoolExecutor(_OPEN_FILES) as pool, Progress(f"checking {split.split}") as progress:

        def look(number: int, pair: Pair) -> _Found:
            return _look(pair, reader, pixels=number % step == 0, decode=decode)

        for pair, found in zip(pairs, pool.map(look, range(len(pairs)), pairs), strict=True):
            progress.add(1)
            problems += found.problems
            if found.counts is not None:
                pixels += np.append(found.counts[: len(classes)], found.counts[IGNORE])
                images += found.counts[: len(classes)] > 0
            if found.stored is not None:
                stored += found.stored
            for number, colour in found.palette.items():
                shown.setdefault(number, {}).setdefault(colour, pair.mask)
    if split.masks == "auto" and split.published is None:
        problems += [*_black_and_white(split, stored), *_palettes_that_disagree(shown)]
    return Report(
        split=split,
        classes=tuple(classes),
        pairs=pairs,
        problems=problems,
        pixels=pixels,
        images=images,
        num_looked_at=len(pairs[::step]),
        notes=tuple(_notes(split, classes, stored)),
    )


def check_folder(split: Split, classes: Sequence[str]) -> str:
    """Look through a split before it is trained or tested on, and say what is in it.

    Returns:
        A line for the log.

    Raises:
        DataError: naming the first problem of each kind that forbids using the data.
    """
    report = check_split(split, classes, every=False, decode=False)
    refuse(report.problems, f"{split.root} ({split.split})")
    return report.line()


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Of one pair: ``counts`` are those of each class number, ``stored`` those of each number in the file."""

    problems: list[Problem]
    counts: np.ndarray | None = None
    stored: np.ndarray | None = None
    palette: dict[int, Colour] = field(default_factory=dict)


def _look(pair: Pair, reader: MaskReader, *, pixels: bool, decode: bool) -> _Found:
    facts = look_at(str(pair.image), decode=decode)
    size = None if facts.fault is not None else (facts.height, facts.width)
    problems = list(_image_problems(pair, facts))
    if not pixels:
        return _Found(problems=problems + _compare_headers(pair, size, reader))
    looked: Looked = reader.look(pair.mask, size)
    return _Found(
        problems=[*problems, *looked.problems],
        counts=None if looked.labels is None else np.bincount(looked.labels.ravel(), minlength=256),
        stored=looked.stored,
        palette=dict(looked.palette),
    )


def _image_problems(pair: Pair, facts: ImageFacts) -> Iterator[Problem]:
    if facts.fault is not None:
        yield Problem(
            action=Action.REFUSED, what="image that cannot be read", detail=facts.fault, file_name=str(pair.image)
        )
        return
    for what, detail in storage_notes(facts):
        yield Problem(action=Action.REPAIRED, what=what, detail=detail, file_name=str(pair.image))


def _compare_headers(pair: Pair, size: tuple[int, int] | None, reader: MaskReader) -> list[Problem]:
    if size is None:
        return []
    try:
        with Image.open(pair.mask) as mask:
            problem = reader.compare_sizes(pair.mask, (mask.height, mask.width), size)
    except UNREADABLE:
        return list(reader.look(pair.mask).problems)
    return [] if problem is None else [problem]


def _black_and_white(split: Split, stored: np.ndarray) -> list[Problem]:
    """Masks of 0 and 255 alone: 255 would be unlabelled, and nothing left to learn but black."""
    labels = {int(label) for label in np.flatnonzero(stored)}
    if labels not in ({0, IGNORE}, {IGNORE}):
        return []
    detail = (
        f"the only values are {' and '.join(map(str, sorted(labels)))}, and 255 means unlabelled; where white is a "
        "class, give dataset.masks=binary, and where it is not, dataset.masks=index"
    )
    place = f"all in {split.split}"
    return [Problem(action=Action.REFUSED, what="binary mask saved as black and white", detail=detail, mask=place)]


def _palettes_that_disagree(shown: dict[int, dict[Colour, Path]]) -> list[Problem]:
    """Palette files that show a number in different colours: one does not know which of both is the class."""
    problems = []
    for number, colours in sorted(shown.items()):
        for (colour, path), (other, other_path) in pairwise(colours.items()):
            detail = (
                f"{number} is {colour} in {path.name} and {other} here; give dataset.masks=index where the numbers "
                "count, or dataset.colours=FILE where the colours do"
            )
            what = "palette that disagrees with another's"
            problems.append(Problem(action=Action.REFUSED, what=what, detail=detail, mask=str(other_path)))
    return problems


def _notes(split: Split, classes: Sequence[str], stored: np.ndarray) -> Iterator[str]:
    """The settings' guess at label 0, where the masks look as if it were another."""
    last = len(classes)
    if split.published is None and split.reduce_zero_label and last < IGNORE and stored[0] and not stored[last]:
        yield (
            f"label {last} ({classes[-1]}) does not occur, and 0 is taken for unlabelled: where 0 is a class, give "
            "dataset.reduce_zero_label=False"
        )
