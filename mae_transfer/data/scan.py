"""What lies below a folder, found once: the list is kept and used again as long as no folder below has changed."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mae_transfer.checkpoint import atomic_write
from mae_transfer.data.names import Names
from mae_transfer.errors import DataError

logger = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
ARRAYS = (".npy", ".npz")
SHARDS = (".tar",)
PARQUET = (".parquet",)
ARROW = (".arrow",)
_ALL = (*IMAGES, *ARRAYS, *SHARDS, *PARQUET, *ARROW)

WORTH_KEEPING = 10_000  # files; fewer are found again as fast as a list of them is read
_FORMAT = 1
# A file added within the clock's granularity after the scan would not show in its folder's time. Like git's index, a
# list is not trusted that was made so soon after a change; no file system's clock is coarser than this.
SETTLED_NS = 2_500_000_000
_REPORT_SECONDS = 10.0


def user_cache() -> Path:
    """Where lists of files are kept unless ``data.scan_cache`` says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mae-transfer"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What could be part of a data set below a folder.

    Attributes:
        names: relative to the folder, sorted folder by folder.
        endings: how many have which ending, in small letters.
    """

    names: Names
    endings: Mapping[str, int]

    def only(self, endings: Sequence[str]) -> Names:
        """The names with one of ``endings``."""
        if set(self.endings) <= set(endings):
            return self.names
        return Names(name for name in self.names if name.lower().endswith(tuple(endings)))


def list_files(root: Path, *, cache: Path | None = None) -> Listing:
    """Every file below ``root`` that could be part of a data set.

    Hidden files and folders are left out, and folders that cannot be read (with a warning);
    a linked folder is followed.

    Args:
        cache: the folder that keeps lists of large folders; None for neither reading nor writing one.

    Raises:
        DataError: ``root`` itself cannot be read.
    """
    kept = load_arrays(cache, "scan", str(root.resolve())) if cache is not None else None
    if kept is not None:
        folders = Names.from_arrays(kept["folders"], kept["folder_ends"])
        if not _changed(root, folders, kept["times"]):
            counts = dict(zip(Names.from_arrays(kept["endings"], kept["ending_ends"]), kept["counts"].tolist()))
            return Listing(names=Names.from_arrays(kept["files"], kept["file_ends"]), endings=counts)
    started = time.time_ns()
    files, times = _walk(root)
    files.sort(key=lambda name: name.split(os.sep))  # noqa: PTH206 - as Paths are ordered, faster
    listing = Listing(names=Names(files), endings=Counter(os.path.splitext(name)[1].lower() for name in files))  # noqa: PTH122
    settled = all(0 < stamp < started - SETTLED_NS for stamp in times.values())
    if cache is not None and settled and len(files) >= WORTH_KEEPING:
        keep_arrays(cache, "scan", str(root.resolve()), _to_arrays(listing, times))
    return listing


def _to_arrays(listing: Listing, times: Mapping[str, int]) -> dict[str, np.ndarray]:
    folders, endings = Names(times), Names(listing.endings)
    return {
        "files": listing.names.block,
        "file_ends": listing.names.ends,
        "folders": folders.block,
        "folder_ends": folders.ends,
        "times": np.array(list(times.values()), np.int64),
        "endings": endings.block,
        "ending_ends": endings.ends,
        "counts": np.array(list(listing.endings.values()), np.int64),
    }


def _changed(root: Path, folders: Names, times: np.ndarray) -> bool:
    """Whether a folder's entries are not what they were: its time of change tells of files that came, went or moved."""
    try:
        return any(
            (root / folder).stat().st_mtime_ns != stamp for folder, stamp in zip(folders, times.tolist(), strict=True)
        )
    except OSError:
        return True


def _walk(root: Path) -> tuple[list[str], dict[str, int]]:
    """Files below ``root``, and the time of change of each folder from before it was read; both relative."""
    files: list[str] = []
    times: dict[str, int] = {}
    # Folders still to be read, each with the (device, inode) of those that it lies in: links may not lead back up.
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    with Progress(f"looking for images below {root}") as progress:
        while pending:
            folder, above = pending.pop()
            before = len(files)
            try:
                status = (root / folder).stat()
                here = (status.st_dev, status.st_ino)
                if here in above:
                    continue
                times[folder] = status.st_mtime_ns
                with os.scandir(root / folder) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        relative = f"{folder}{os.sep}{entry.name}" if folder else entry.name
                        if entry.is_dir():
                            pending.append((relative, above | {here}))
                        elif entry.name.lower().endswith(_ALL):
                            files.append(relative)
            except OSError as error:
                if not folder:
                    raise DataError(f"cannot read folder {root}: {error.strerror}") from error
                logger.warning("folder %s is left out, it cannot be read: %s", root / folder, error.strerror)
                times[folder] = 0  # and such a list is not kept
            progress.add(len(files) - before)
    return files, times


class Progress:
    """A count on the terminal, or a line in the log now and then, of something that usually takes no time."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0
        self._reported = time.monotonic()
        # The bar shows itself after two seconds.
        self._bar = tqdm(desc=what, unit=" files", delay=2.0, leave=False) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def add(self, count: int) -> None:
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._reported > _REPORT_SECONDS:
            self._reported = time.monotonic()
            logger.info("%s: %d so far", self.what, self.count)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _cache_file(cache: Path, kind: str, key: str) -> Path:
    return cache / f"{kind}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npz"


def load_arrays(cache: Path, kind: str, key: str) -> dict[str, np.ndarray] | None:
    """What ``keep_arrays`` kept; None if nothing was, or nothing that can be read."""
    path = _cache_file(cache, kind, key)
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = dict(content)
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a cache, the data are looked at instead
        logger.warning("leaving the list %s aside, it cannot be read (%s)", path, error)
        return None
    expected = np.array([_FORMAT]), np.frombuffer(os.fsencode(key), np.uint8)
    if not all(np.array_equal(arrays.pop(name, None), value) for name, value in zip(("format", "key"), expected)):
        return None
    return arrays


def keep_arrays(cache: Path, kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays for next time; where that is not possible, there is simply no next time."""
    path = _cache_file(cache, kind, key)
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, format=np.array([_FORMAT]), key=np.frombuffer(os.fsencode(key), np.uint8), **arrays)  # type: ignore[arg-type]
    except OSError as error:
        logger.info("the list of files is not kept: %s", error)
