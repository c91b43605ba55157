"""Where images come from: folders of image files, nested, several roots, optionally decoded once into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mae_transfer.data.decode import decode_image
from mae_transfer.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


def scan_folders(roots: Sequence[str | Path]) -> list[Path]:
    """Every image file below ``roots``: roots in the order given, files sorted by path within each.

    The order is the samples' numbering, hence part of what a seed means. Hidden files and folders are left out; a
    linked folder is followed.

    Raises:
        DataError: a root is missing, is not a folder, or holds no image.
    """
    if not roots:
        raise DataError("no image folder given; set data.path=FOLDER")
    files: list[Path] = []
    for root in map(Path, roots):
        if not root.exists():
            raise DataError(f"image folder {root} does not exist")
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; give the folder that holds the images")
        found = sorted(_images_below(root))
        if not found:
            raise DataError(f"no images found below {root} (looked for {', '.join(EXTENSIONS)})")
        files.extend(found)
    return files


def _images_below(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.lower().endswith(EXTENSIONS) and name[0] != "."]
    return found


class ImageFolder:
    """Images by number, decoded on demand."""

    def __init__(self, roots: Sequence[str | Path], *, channels: int = 3) -> None:
        self.paths = scan_folders(roots)
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        """Raises DataError when the file cannot be read."""
        return decode_image(self.paths[index], channels=self.channels)


class CachedImages:
    """The images of a source decoded once and kept as uint8 pixels in one block of memory.

    One block, so that worker processes started afterwards share its pages. Files that cannot be read stay
    unreadable: asking for one raises the error of its decoding, as the source itself would.

    Raises:
        DataError: the decoded images need more than ``limit_bytes``.
    """

    def __init__(self, source: ImageFolder, *, limit_bytes: int, threads: int | None = None) -> None:
        self.paths = source.paths
        self.channels = source.channels
        self._shapes: list[tuple[int, ...]] = []
        self._offsets: list[int] = []
        self._errors: dict[int, str] = {}
        blocks: list[np.ndarray] = []
        total = 0
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            # In batches: the pool would otherwise decode everything before the limit is looked at.
            for start in range(0, len(source), 1024):
                indices = range(start, min(start + 1024, len(source)))
                for index, decoded in zip(
                    indices, pool.map(lambda i: _decode_or_error(source, i), indices), strict=True
                ):
                    if isinstance(decoded, DataError):
                        self._errors[index] = str(decoded)
                        decoded = np.empty(0, np.uint8)
                    self._shapes.append(decoded.shape)
                    self._offsets.append(total)
                    total += decoded.size
                    blocks.append(decoded.reshape(-1))
                if total > limit_bytes:
                    raise DataError(
                        f"data.cache=ram: the first {len(blocks)} of {len(source)} images already need "
                        f"{total / 2**30:.1f} GiB, more than data.cache_gib={limit_bytes / 2**30:g}; "
                        "raise data.cache_gib or set data.cache=none"
                    )
        self._pixels = np.concatenate(blocks)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_bytes(self) -> int:
        return self._pixels.nbytes

    def __getitem__(self, index: int) -> Image.Image:
        if index in self._errors:
            raise DataError(self._errors[index])
        shape, offset = self._shapes[index], self._offsets[index]
        size = int(np.prod(shape))
        return Image.fromarray(self._pixels[offset : offset + size].reshape(shape))


def _decode_or_error(source: ImageFolder, index: int) -> np.ndarray | DataError:
    try:
        return np.asarray(source[index])
    except DataError as error:
        return error
