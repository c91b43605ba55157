"""Where images come from: a numbered list of pictures, decoded on demand, or once into memory.

Folders of image files are here; shards are in ``mae_transfer.data.shards``, tables in ``mae_transfer.data.tables``, and
``mae_transfer.data.find.open_source`` looks at a path and says which it is.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from mae_transfer.data import scan
from mae_transfer.data.decode import Picture, Pixels, is_picture, open_array, open_picture
from mae_transfer.data.labels import check_class_folders
from mae_transfer.data.names import Names, Parts
from mae_transfer.errors import DataError


class Source(ABC):
    """Images by number. The numbering is part of what a seed means: it depends on the names alone.

    Args:
        channels: how many the pixels have.
        floats: whether files of float values may be taken as they are (see ``open_picture``).
    """

    def __init__(self, *, channels: int, floats: bool) -> None:
        self.channels = channels
        self.floats = floats

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message: where a person finds it."""

    @abstractmethod
    def place(self, index: int) -> tuple[str, int]:
        """The file that an image is in, as its path was given, and which of those in there it is."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of the image's file. Raises DataError when they cannot be read."""

    def picture(self, index: int) -> Picture:
        """The image, not decoded yet where that is possible. Raises DataError when it cannot be read."""
        return open_picture(self.encoded(index), channels=self.channels, name=self.name(index), floats=self.floats)

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, C) of ``channels`` channels, not to be written to. Raises DataError when it cannot be read."""
        pixels = self.picture(index).decode()
        return pixels if pixels.shape[2] == self.channels else np.repeat(pixels, self.channels, axis=2)

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int64, each the number of a class; or None where the data have none. Raises DataError for others."""
        return None

    @property
    def classes(self) -> list[str] | None:
        """The name of each label, or None where there are no names."""
        return None


def scan_folders(roots: Sequence[str | Path]) -> list[Path]:
    """Every image file below ``roots``: roots in the order given, files sorted by path within each.

    Raises:
        DataError: a root is missing, is not a folder, or holds no image.
    """
    folders = check_roots(roots)
    listings = [scan.list_files(root) for root in folders]
    return list(Paths(folders, _image_names(folders, listings, scan.IMAGES)))


def check_roots(roots: Sequence[str | Path]) -> list[Path]:
    """Raises DataError unless every root is a folder, and there is one."""
    if not roots:
        raise DataError("no image folder given; name the folder that holds the images")
    for root in map(Path, roots):
        if not root.exists():
            raise DataError(f"image folder {root} does not exist")
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; give the folder that holds the images")
    return [Path(root) for root in roots]


def _image_names(roots: Sequence[Path], listings: Sequence[scan.Listing], endings: Sequence[str]) -> list[Names]:
    names = [listing.only(endings) for listing in listings]
    for root, found in zip(roots, names, strict=True):
        if not found:
            raise DataError(f"no images found below {root} (looked for {', '.join(endings)})")
    return names


class Paths(Sequence[Path]):
    """Root after root of packed names, as paths."""

    def __init__(self, roots: Sequence[Path], names: Sequence[Names]) -> None:
        self.roots = [str(root) for root in roots]
        self.names = names
        self._parts = Parts(map(len, names))

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Path(self.text(index))

    def text(self, index: int) -> str:
        part, place = self._parts.locate(index)
        return os.path.join(self.roots[part], self.names[part][place])  # noqa: PTH118 - once an image, and ten times as fast


class ImageFolder(Source):
    """Image files below one or several folders.

    Measured data (channels other than one or three) may be ``.npy`` and ``.npz`` as well; pictures may where there are
    no image files, so that arrays that lie beside images do not become samples.

    Labels are those of torchvision's ImageFolder: the folders directly below the roots, sorted by name. There are none
    where images lie in a root itself; one folder is one class.
    """

    def __init__(
        self,
        roots: Sequence[str | Path],
        *,
        channels: int = 3,
        floats: bool = True,
        listings: Sequence[scan.Listing] | None = None,
    ) -> None:
        super().__init__(channels=channels, floats=floats)
        folders = check_roots(roots)
        listings = [scan.list_files(root) for root in folders] if listings is None else listings
        images = any(set(listing.endings) & set(scan.IMAGES) for listing in listings)
        endings = scan.IMAGES if images and is_picture(channels) else (*scan.IMAGES, *scan.ARRAYS)
        self.paths = Paths(folders, _image_names(folders, listings, endings))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths.text(index)

    def place(self, index: int) -> tuple[str, int]:
        return self.paths.text(index), 0

    def encoded(self, index: int) -> bytes:
        return read_file(self.paths.text(index))

    def picture(self, index: int) -> Picture:
        path = self.paths.text(index)
        if path.endswith((".npy", ".NPY")):
            return open_array(Path(path), channels=self.channels, floats=self.floats)
        return open_picture(read_file(path), channels=self.channels, name=path, floats=self.floats)

    @property
    def labels(self) -> np.ndarray | None:
        found = self._classes
        return None if found is None else found[1]

    @property
    def classes(self) -> list[str] | None:
        found = self._classes
        return None if found is None else found[0]

    @cached_property
    def _classes(self) -> tuple[list[str], np.ndarray] | None:
        folders = [name.partition(os.sep) for part in self.paths.names for name in part]
        if not all(separator for _, separator, _ in folders):
            return None
        classes = sorted({folder for folder, _, _ in folders})
        check_class_folders(self.paths.roots, classes)
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, np.array([numbers[folder] for folder, _, _ in folders], np.int64)


def read_file(path: str | Path) -> bytes:
    """Raises DataError where that is not possible."""
    try:
        # Unbuffered: one read of the size that the file has.
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - for speed
            return file.read()
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from error


class Subset(Source):
    """Some images of a source, numbered anew in the order of ``indices``; labels and classes are those of the whole."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        super().__init__(channels=source.channels, floats=source.floats)
        self.source = source
        self.indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(int(self.indices[index]))

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(int(self.indices[index]))

    def picture(self, index: int) -> Picture:
        return self.source.picture(int(self.indices[index]))

    @property
    def labels(self) -> np.ndarray | None:
        labels = self.source.labels
        return None if labels is None else labels[self.indices]

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes


class CachedImages(Source):
    """The images of a source decoded once and kept in one block of memory.

    One block, so that worker processes started afterwards share its pages. Files that cannot be read stay
    unreadable: asking for one raises the error of its decoding, as the source itself would.

    Raises:
        DataError: the decoded images need more than ``limit_bytes``.
    """

    def __init__(self, source: Source, *, limit_bytes: int, threads: int | None = None) -> None:
        super().__init__(channels=source.channels, floats=source.floats)
        self.source = source
        self._shapes: list[tuple[int, ...]] = []
        self._types: list[np.dtype] = []
        self._offsets: list[int] = []
        self._errors: dict[int, str] = {}
        blocks: list[np.ndarray] = []
        total = 0
        for index, decoded in enumerate(_decode_all(source, threads or os.cpu_count() or 1)):
            if isinstance(decoded, DataError):
                self._errors[index] = str(decoded)
                decoded = np.empty((0, 0, 0), np.uint8)
            self._shapes.append(decoded.shape)
            self._types.append(decoded.dtype)
            self._offsets.append(total)
            total += decoded.nbytes
            blocks.append(np.ascontiguousarray(decoded).reshape(-1).view(np.uint8))
            if total > limit_bytes:
                raise DataError(
                    f"data.cache=ram: the first {len(blocks)} of {len(source)} images already need "
                    f"{total / 2**30:.1f} GiB, more than data.cache_gib={limit_bytes / 2**30:g}; "
                    "raise data.cache_gib or set data.cache=none"
                )
        self._pixels = np.concatenate(blocks)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def num_bytes(self) -> int:
        return self._pixels.nbytes

    def name(self, index: int) -> str:
        return self.source.name(index)

    def place(self, index: int) -> tuple[str, int]:
        return self.source.place(index)

    def encoded(self, index: int) -> bytes:
        return self.source.encoded(index)

    def picture(self, index: int) -> Picture:
        if index in self._errors:
            raise DataError(self._errors[index])
        shape, start, kind = self._shapes[index], self._offsets[index], self._types[index]
        size = int(np.prod(shape)) * kind.itemsize
        return Pixels(self._pixels[start : start + size].view(kind).reshape(shape))

    @property
    def labels(self) -> np.ndarray | None:
        return self.source.labels

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes


def _decode_all(source: Source, threads: int) -> Iterator[np.ndarray | DataError]:
    with ThreadPoolExecutor(threads) as pool:
        # In batches: the pool would otherwise decode everything before anybody looks at the first.
        for start in range(0, len(source), 256):
            indices = range(start, min(start + 256, len(source)))
            yield from pool.map(lambda index: _decode_or_error(source, index), indices)


def _decode_or_error(source: Source, index: int) -> np.ndarray | DataError:
    try:
        return source.picture(index).decode()
    except DataError as error:
        return error
