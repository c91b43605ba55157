"""Mask files as class numbers: one number a pixel, a colour for each class, or black and white."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mae_transfer.data.limits import UNREADABLE, check_pixels, reason
from mae_transfer.data.problems import Action, Problem
from mae_transfer.errors import DataError

IGNORE = 255
KINDS = ("auto", "index", "colours", "binary")

# A mask that is to be resized has its image's proportions, but for rounding.
MAX_DISTORTION = 0.05
_SHOWN = 5  # labels or colours that a message lists
_SMOOTHED = 64  # as many unknown colours come from smoothing or JPEG, not from a forgotten class

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """What the numbers in files of one ending mean, where they are not the classes' own.

    Attributes:
        ending: of the mask file's name.
        classes: class number, or ``IGNORE``, of every number that may be stored.
    """

    ending: str
    classes: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """A mask and what is wrong with it.

    Attributes:
        labels: (H, W) class numbers, ``IGNORE`` where nothing is labelled; None where they cannot be had.
        stored: how many pixels hold each of the numbers 0 to 255; None where the file holds colours.
        palette: the colour in which a palette file shows each number that occurs.
    """

    labels: np.ndarray | None = None
    stored: np.ndarray | None = None
    palette: Mapping[int, Colour] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MaskReader:
    """How the mask files of a data set become class numbers.

    Attributes:
        kind: "index": a number a pixel, in gray or palette files, whose palette only says how they are shown.
            "colours": what ``colours`` says of the colour shown. "binary": black is class 0, white (or 1) class 1.
            "auto": as "index"; 1-bit files count as black and white, so that a check can tell them.
        num_classes: labels are 0 to ``num_classes`` - 1.
        reduce_zero_label: number 0 is unlabelled, and the classes are numbered from 1.
        colours: class number, or ``IGNORE``, of every RGB colour that may occur.
        numberings: of files that are numbered otherwise, by their ending; the first that fits counts.
        resize: bring a mask to its image's size by nearest neighbour, where it has the image's proportions.
    """

    kind: str = "auto"
    num_classes: int
    reduce_zero_label: bool = False
    colours: Mapping[Colour, int] = field(default_factory=dict)
    numberings: tuple[Numbering, ...] = ()
    resize: bool = False

    def read(self, path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
        """The labels of a mask, (H, W) uint8.

        Args:
            size: (H, W) of its image; None does not compare.

        Raises:
            DataError: it cannot be read, is of another size or kind, or holds what no class has.
        """
        looked = self.look(path, size)
        refused = [problem for problem in looked.problems if problem.action is Action.REFUSED]
        if refused or looked.labels is None:
            raise DataError("; ".join(map(str, refused)))
        return looked.labels

    def look(self, path: str | Path, size: tuple[int, int] | None = None) -> Looked:
        """``read`` without raising: the labels as far as they can be had, and everything that is wrong."""
        try:
            with Image.open(path) as image:
                check_pixels(image.height, image.width, name=str(path))
                image.load()
                looked = self._decode(image, str(path))
        except DataError as error:
            return Looked(problems=(_refused(path, "mask that cannot be read", str(error)),))
        except UNREADABLE as error:
            return Looked(problems=(_refused(path, "mask that cannot be read", reason(error)),))
        if looked.labels is None or size is None:
            return looked
        problem = self.compare_sizes(path, (looked.labels.shape[0], looked.labels.shape[1]), size)
        if problem is None:
            return looked
        labels = looked.labels
        if problem.action is Action.REPAIRED:
            labels = np.asarray(Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST))
        return replace(looked, labels=labels, problems=(*looked.problems, problem))

    def compare_sizes(self, path: str | Path, mask: tuple[int, int], image: tuple[int, int]) -> Problem | None:
        """What is done about a mask of another size than its image; both are (H, W)."""
        if mask == image:
            return None
        detail = f"it is {mask[1]}x{mask[0]} pixels, the image {image[1]}x{image[0]}"
        what = "mask of another size than its image"
        distortion = abs(np.log(mask[0] * image[1] / (mask[1] * image[0]))) if min(mask) else np.inf
        if self.resize and distortion <= MAX_DISTORTION:
            text = f"{detail}; it is resized by nearest neighbour"
            return Problem(action=Action.REPAIRED, what=what, detail=text, mask=str(path))
        if distortion > MAX_DISTORTION:
            turned = "; the one lies on its side" if mask == image[::-1] else ", which has other proportions"
            return _refused(path, what, f"{detail}{turned}: draw it on the image as it is displayed")
        return _refused(path, what, f"{detail}; correct it, or let it be resized by dataset.mask_size=resize")

    def _decode(self, image: Image.Image, path: str) -> Looked:
        if image.mode == "F":
            return _cannot_be_labels(path, "mask of float pixels", "expected whole numbers or colours in 8 bits")
        if "A" in image.getbands() or "transparency" in image.info:
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
            if alpha.min(initial=255) < 255:
                return _cannot_be_labels(path, "mask with transparency", "what is under it is unknown; save it without")
        if self.kind == "colours":
            return self._by_colour(image, path)
        if self.kind == "binary":
            return self._black_and_white(image, path)
        return self._by_number(image, path)

    def _by_number(self, image: Image.Image, path: str) -> Looked:
        if len(image.getbands()) > 1:
            gray = len({band.tobytes() for band in image.convert("RGB").split()}) == 1
            hint = "its channels are equal: save one of them" if gray else _COLOUR_HINT
            return _cannot_be_labels(
                path, "mask that holds colours", f"{len(image.getbands())} channels; expected a number a pixel: {hint}"
            )
        if image.mode == "1" and self.kind == "auto":
            image = image.convert("L")  # 0 and 255
        numbers = np.asarray(image).astype(np.int64 if image.mode.startswith("I") else np.uint8)
        if numbers.max(initial=0) > IGNORE or numbers.min(initial=0) < 0:
            beyond = numbers.max() if numbers.max() > IGNORE else numbers.min()
            return _cannot_be_labels(
                path, "label that is none", f"{beyond}; labels up to 254 are possible, 255 is unlabelled"
            )
        numbers = numbers.astype(np.uint8)
        stored = np.bincount(numbers.ravel(), minlength=256)
        table, is_known = self._table(path)
        wrong = [int(number) for number in np.flatnonzero(stored) if not is_known[number]]
        problems = (_refused(path, "label of no class", self._wrong_labels(wrong, stored)),) if wrong else ()
        return Looked(labels=table[numbers], stored=stored, palette=_palette(image, stored), problems=problems)

    def _table(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """For each of the numbers 0 to 255 its class, and whether it may be stored."""
        found = next((entry for entry in self.numberings if path.endswith(entry.ending)), None)
        return _look_up(found.classes) if found is not None else self._own_table

    @cached_property
    def _own_table(self) -> tuple[np.ndarray, np.ndarray]:
        first = int(self.reduce_zero_label)
        classes = {first + label: label for label in range(self.num_classes)}
        return _look_up({**({0: IGNORE} if first else {}), **classes, IGNORE: IGNORE})

    def _wrong_labels(self, wrong: list[int], stored: np.ndarray) -> str:
        first, last = int(self.reduce_zero_label), self.num_classes - 1 + int(self.reduce_zero_label)
        hint = ""
        if not self.numberings and not self.reduce_zero_label and wrong == [self.num_classes]:
            hint = "; where 0 is unlabelled, give dataset.reduce_zero_label=True"
        expected = f"{self.num_classes} classes are labelled {first} to {last}{', 0 is unlabelled' if first else ''}"
        if self.numberings:
            expected = f"{self.num_classes} classes are numbered otherwise"
        shown = ", ".join(f"{number} ({stored[number]} pixels)" for number in wrong[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        return f"{shown}{more}; the {expected} (255 is ignored): correct the mask or the list of classes{hint}"

    def _by_colour(self, image: Image.Image, path: str) -> Looked:
        if image.mode.startswith("I"):
            return _cannot_be_labels(path, "mask of numbers", f"{image.mode} pixels; expected the colours of the table")
        codes = _codes(np.asarray(image.convert("RGB")))
        known, classes = self._colour_table
        place = np.searchsorted(known, codes).clip(max=len(known) - 1)
        is_known = known[place] == codes
        labels = np.where(is_known, classes[place], IGNORE).astype(np.uint8)
        if is_known.all():
            return Looked(labels=labels)
        unknown, counts = np.unique(codes[~is_known], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:_SHOWN]
        shown = ", ".join(f"{_colour(unknown[index])} ({counts[index]} pixels)" for index in order)
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        smoothed = len(unknown) >= _SMOOTHED
        hint = "so many come from smoothing or JPEG: save masks without" if smoothed else "add them to dataset.colours"
        return Looked(labels=labels, problems=(_refused(path, "colour of no class", f"{shown}{more}; {hint}"),))

    @cached_property
    def _colour_table(self) -> tuple[np.ndarray, np.ndarray]:
        """The known colours as numbers, ascending, and their classes."""
        pairs = sorted((red << 16 | green << 8 | blue, label) for (red, green, blue), label in self.colours.items())
        return np.array([code for code, _ in pairs], np.int64), np.array([label for _, label in pairs], np.int64)

    def _black_and_white(self, image: Image.Image, path: str) -> Looked:
        if len(image.getbands()) > 1 or image.mode == "P":
            channels = np.asarray(image.convert("RGB"))
            if (channels != channels[..., :1]).any():
                detail = "expected black and white; give dataset.colours=FILE, or dataset.masks=index for a palette"
                return _cannot_be_labels(path, "mask that holds colours", detail)
            values = channels[..., 0]
        else:
            values = np.asarray(image)
        occurring, counts = np.unique(values, return_counts=True)
        others = [int(value) for value in occurring if value]
        white = {1, 255, 65535} if image.mode.startswith("I") else {1, 255}
        if len(others) <= 1 and set(others) <= white:
            return Looked(labels=(values != 0).astype(np.uint8))
        gray = sum(int(count) for value, count in zip(occurring, counts, strict=True) if value not in (0, *white))
        shown = f"values {', '.join(map(str, others[:_SHOWN]))}{' …' if len(others) > _SHOWN else ''} beside 0"
        detail = f"{shown}, {gray} gray pixels; expected 0 and 255, or 0 and 1: save it without smoothing"
        return _cannot_be_labels(path, "mask that is not black and white", detail)


_COLOUR_HINT = "give dataset.colours=FILE, a table of the classes' colours, or save it as an index PNG"


def _look_up(classes: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    table, is_known = np.full(256, IGNORE, np.uint8), np.zeros(256, bool)
    for number, label in classes.items():
        if number <= IGNORE:  # more classes than numbers is another's concern
            table[number], is_known[number] = label, True
    return table, is_known


def _palette(image: Image.Image, stored: np.ndarray) -> dict[int, Colour]:
    if image.mode != "P":
        return {}
    channels = [*(image.getpalette("RGB") or []), *[0] * 768]
    return {n: (channels[3 * n], channels[3 * n + 1], channels[3 * n + 2]) for n in map(int, np.flatnonzero(stored))}


def _codes(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W), one number a colour."""
    wide = pixels.astype(np.int64)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _colour(code: int) -> Colour:
    return int(code) >> 16, int(code) >> 8 & 255, int(code) & 255


def _refused(path: str | Path, what: str, detail: str) -> Problem:
    return Problem(action=Action.REFUSED, what=what, detail=detail, mask=str(path))


def _cannot_be_labels(path: str, what: str, detail: str) -> Looked:
    return Looked(problems=(_refused(path, what, detail),))
