"""Millions of names in one block of memory, and numbers that run through several lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """File names, packed.

    A list of Python strings would be several times as large, and worker processes that only count references to them
    would copy every page of it (the well-known growth of DataLoader workers).
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.block = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def from_arrays(cls, block: np.ndarray, ends: np.ndarray) -> Names:
        names = cls.__new__(cls)
        names.block, names.ends = block, ends
        return names

    def part(self, start: int, stop: int) -> Names:
        """Names ``start`` to ``stop`` as a list of their own."""
        first = int(self.ends[start - 1]) if start else 0
        last = int(self.ends[stop - 1]) if stop else 0
        return Names.from_arrays(self.block[first:last], self.ends[start:stop] - first)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.block[start : int(self.ends[index])].tobytes())


class Parts:
    """One numbering through several lists of ``lengths``, one after the other."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self.ends = np.cumsum(list(lengths), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def start(self, part: int) -> int:
        """The number of the first of a list."""
        return int(self.ends[part - 1]) if part else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Which list a number is in, and where in it. Raises IndexError outside of all."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - self.start(part)
