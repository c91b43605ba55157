"""Where windows lie, and which sizes give whole maps."""

from __future__ import annotations

import math
from collections.abc import Sequence


def whole_maps(patch_size: int) -> int:
    """Pixels of which an image's sides must be multiples for whole maps at the patch's stride.

    The patch itself where it is a power of two. A patch of 14 is resampled to stride 16 by the pyramid: 112.
    """
    return math.lcm(patch_size, 2 ** round(math.log2(patch_size)))


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows along one side: every ``stride``, the last one moved back to end at the border.

    >>> window_starts(683, 512, 341)
    [0, 171]
    """
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - crop), 0) for index in range(count)]


def window_counts(length: int, crop: int, starts: Sequence[int]) -> list[int]:
    """In how many of the windows each of ``length`` pixels along one side lies.

    >>> window_counts(5, 3, [0, 2])
    [1, 1, 2, 1, 1]
    """
    return [sum(start <= pixel < start + crop for start in starts) for pixel in range(length)]
