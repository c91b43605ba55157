"""Outlines and boxes of COCO annotations: read, checked, and repaired or given up."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import pycocotools.mask as mask_util

from mae_transfer.data.problems import Action

# Reports (action, kind of problem, detail) of the annotation at hand.
Note = Callable[[Action, str, str], None]
Extent = tuple[float, float, float, float]  # x0, y0, x1, y1

_MARGIN = 1.0  # pixels that an outline may reach outside its image, or a box away from its outline, without a word
_AGREEMENT = 0.75  # IoU from which on a box is that of its outline


def read_outline(
    segmentation: Any, size: tuple[int, int], note: Note
) -> tuple[list[list[float]] | dict[str, Any], Extent] | None:
    """Usable polygons, or an RLE with compressed counts, and what bounds it within the image.

    Args:
        size: height and width of the image.

    Returns:
        None where nothing usable is left, or where it is to be refused.
    """
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, size, note)
    if isinstance(segmentation, list):
        return _read_polygons(segmentation, size, note)
    note(Action.REFUSED, "segmentation that is neither polygons nor RLE", f"it is {str(segmentation)[:60]!r}")
    return None


def _read_polygons(polygons: list[Any], size: tuple[int, int], note: Note) -> tuple[list[list[float]], Extent] | None:
    if all(isinstance(value, (int, float)) for value in polygons):
        note(Action.REPAIRED, "polygon that is not in a list of polygons", "it is taken as the only one")
        polygons = [polygons]
    kept: list[list[float]] = []
    extents: list[Extent] = []
    for polygon in polygons:
        extent = _extent(polygon, size)
        if isinstance(extent, str):
            if len(polygons) > 1:
                note(Action.REPAIRED, f"polygon that {extent}", "the annotation's other polygons are used")
            fault = extent
        else:
            kept.append(polygon)
            extents.append(extent)
    if not kept:
        note(Action.LEFT_OUT, f"outline that {fault}", "")
        return None
    x0, y0 = min(e[0] for e in extents), min(e[1] for e in extents)
    x1, y1 = max(e[2] for e in extents), max(e[3] for e in extents)
    height, width = size
    if min(x0, y0) < -_MARGIN or x1 > width + _MARGIN or y1 > height + _MARGIN:
        found = f"it spans x {x0:g} to {x1:g} and y {y0:g} to {y1:g} of {width}x{height}; the part inside is used"
        note(Action.REPAIRED, "outline that reaches outside the image", found)
    return kept, (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))


def _extent(polygon: Any, size: tuple[int, int]) -> Extent | str:
    """What bounds a polygon, or, as the end of a sentence, why it is none."""
    try:
        finite = isinstance(polygon, list) and math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        return "is no list of finite numbers"
    if len(polygon) % 2:
        return "has an odd number of values"
    if len(polygon) < 6:
        return "has fewer than three points"
    xs, ys = polygon[0::2], polygon[1::2]
    x0, y0, x1, y1 = min(xs), min(ys), max(xs), max(ys)
    height, width = size
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return "lies outside the image"
    if x0 < -width or y0 < -height or x1 > 2 * width or y1 > 2 * height:
        return "reaches further outside the image than the image is large"  # drawing it would take any amount of memory
    twice_area = sum(map(operator.mul, xs, ys[1:] + ys[:1])) - sum(map(operator.mul, ys, xs[1:] + xs[:1]))
    # Of thin slivers the sums differ by rounding alone. A figure eight may cancel out, but then it has a box.
    if x1 <= x0 or y1 <= y0 or (len(xs) == 3 and abs(twice_area) < 1e-9 * (x1 * y1 + 1)):
        return "encloses no area"
    return x0, y0, x1, y1


def _read_rle(rle: dict[str, Any], size: tuple[int, int], note: Note) -> tuple[dict[str, Any], Extent] | None:
    if not {"size", "counts"} <= rle.keys():
        note(Action.REFUSED, "RLE without size and counts", f"it has {', '.join(map(str, rle)) or 'nothing'}")
        return None
    if not isinstance(rle["size"], list) or tuple(rle["size"]) != size:
        note(Action.REFUSED, "RLE of another size than its image", f"{rle['size']}, its image is {list(size)}")
        return None
    runs = rle_runs(rle["counts"])
    if runs is None or runs.sum() != size[0] * size[1]:
        found = "its counts cannot be read" if runs is None else f"its runs add up to {runs.sum()}"
        note(Action.LEFT_OUT, "damaged RLE", f"{found}, its image has {size[0] * size[1]} pixels")
        return None
    if not runs[1::2].any():
        note(Action.LEFT_OUT, "RLE without a pixel", "")
        return None
    if isinstance(rle["counts"], list):
        rle = mask_util.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)
    x, y, width, height = mask_util.toBbox(rle).tolist()
    return rle, (x, y, x + width, y + height)


def rle_runs(counts: Any) -> np.ndarray | None:
    """The lengths of the runs of an RLE, zeros first, (R,) int64; None where it is none.

    pycocotools does not check: a damaged one makes it read memory that is not its own.

    Args:
        counts: a list of numbers, or COCO's compressed text: numbers in groups of five bits, lowest first, 48 added to
            each; bit 32 says that a group follows, bit 16 of the last is the sign. From the fourth number on, it is the
            difference to the number two places before.
    """
    if isinstance(counts, list):
        if not all(isinstance(run, int) and 0 <= run < 2**31 for run in counts):
            return None
        return np.array(counts, dtype=np.int64)
    if not isinstance(counts, str) or not counts.isascii():
        return None
    groups = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48  # (G,)
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    ends = np.flatnonzero(groups & 32 == 0)  # (R,) the last group of each number
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 32 bits
        return None
    places = np.arange(len(groups)) - np.repeat(starts, lengths)
    values = np.add.reduceat((groups & 31) << (5 * places), starts)
    values -= np.where(groups[ends] & 16, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return None if values.min() < 0 else values


def is_box(box: Any) -> TypeGuard[list[float]]:
    """Whether this is x, y and a positive width and height."""
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
    return numbers and math.isfinite(sum(box)) and box[2] > 0 and box[3] > 0


def check_box(box: Any, extent: Extent, note: Note) -> bool:
    """Whether the json's box (x, y, width, height) is that of the outline; the outline's is used where it is not."""
    if box is None or not is_box(box):
        what = "annotation without a box" if box is None else "box that is none"
        note(Action.REPAIRED, what, _instead(box, extent))
        return False
    x0, y0, x1, y1 = extent
    u0, v0, u1, v1 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if abs(x0 - u0) <= _MARGIN and abs(y0 - v0) <= _MARGIN and abs(x1 - u1) <= _MARGIN and abs(y1 - v1) <= _MARGIN:
        return True
    inner = max(0, min(x1, u1) - max(x0, u0)) * max(0, min(y1, v1) - max(y0, v0))
    union = (x1 - x0) * (y1 - y0) + box[2] * box[3] - inner
    if inner >= _AGREEMENT * union:
        return True
    note(Action.REPAIRED, "box that disagrees with its outline", _instead(box, extent))
    return False


def _instead(box: Any, extent: Extent) -> str:
    x0, y0, x1, y1 = extent
    return f"{str(box)[:80]}; the outline's is used, {[x0, y0, x1 - x0, y1 - y0]}"
