"""Which kind of source a path holds, by looking."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from mae_transfer.data import scan
from mae_transfer.data.decode import is_picture
from mae_transfer.data.shards import TarShards
from mae_transfer.data.source import ImageFolder, Source
from mae_transfer.data.tables import ArrowImages, ParquetImages, saved_files
from mae_transfer.errors import DataError

_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|test|val|valid|validation|dev)(?:[^a-z]|$)")
_KINDS = {"shards": scan.SHARDS, "parquet": scan.PARQUET, "arrow": scan.ARROW}
_CALLED = {
    "folder": "image files",
    "shards": ".tar shards",
    "parquet": ".parquet files",
    "arrow": "a `datasets` folder",
}


def open_source(
    roots: Sequence[str | Path],
    *,
    channels: int = 3,
    floats: bool = True,
    cache: Path | None = None,
    key: str | None = None,
) -> Source:
    """The images of one or several paths, which are all of one kind.

    A path is a folder of image files, nested or not; a folder of WebDataset shards (``*.tar``) or of parquet files, or
    such a file itself, or a pattern for such files (``shards/train-*.tar``); or a folder saved by Hugging Face
    ``datasets``.

    Args:
        channels: how many the pixels have.
        floats: whether files of float values may be taken as they are (see ``open_picture``).
        cache: the folder that keeps lists of files and indices of shards; None for neither reading nor writing one.
        key: the setting that the paths were given by, for messages.

    Raises:
        DataError: nothing there, several kinds in one folder or in several, several splits in one folder.
        MissingDependencyError: tables need pyarrow.
    """
    try:
        return _open(roots, channels=channels, floats=floats, cache=cache)
    except DataError as error:
        if key is None:
            raise
        raise DataError(f"{key}: {error}") from error


def _open(roots: Sequence[str | Path], *, channels: int, floats: bool, cache: Path | None) -> Source:
    if not roots:
        raise DataError("no image folder given; name the folder that holds the images")
    paths = [path for root in roots for path in _expand(str(root))]
    listings = [scan.list_files(path, cache=cache) if path.is_dir() else None for path in paths]
    kinds = [_kind(path, listing, channels) for path, listing in zip(paths, listings, strict=True)]
    if len(set(kinds)) > 1:
        found = "; ".join(f"{path} holds {_CALLED[kind]}" for path, kind in zip(paths, kinds, strict=True))
        raise DataError(f"the paths are of several kinds: {found}. Use one kind in a run")
    kind = kinds[0]
    if kind == "folder":
        folders = [listing for listing in listings if listing is not None]
        return ImageFolder(paths, channels=channels, floats=floats, listings=folders)
    files: list[Path] = []
    for path, listing in zip(paths, listings, strict=True):
        if listing is None:
            files.append(path)
        elif kind == "arrow":
            files += saved_files(path)
        else:
            files += [path / name for name in listing.only(_KINDS[kind])]
    if kind != "shards":
        _refuse_several_splits(files, paths)
    if kind == "shards":
        return TarShards(files, channels=channels, floats=floats, cache=cache)
    return (ParquetImages if kind == "parquet" else ArrowImages)(files, channels=channels, floats=floats)


def _expand(root: str) -> list[Path]:
    path = Path(root)
    if path.exists():
        return [path]
    found = sorted(glob.glob(root)) if glob.has_magic(root) else []  # noqa: PTH207 - absolute patterns too
    if not found:
        raise DataError(f"image folder {path} does not exist")
    return [Path(name) for name in found]


def _kind(path: Path, listing: scan.Listing | None, channels: int) -> str:
    if listing is None:
        for kind, endings in _KINDS.items():
            if path.name.lower().endswith(endings):
                return kind
        raise DataError(f"{path} is not a folder; give the folder that holds the images, or .tar or .parquet files")
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "arrow"
    pictures = (*scan.IMAGES, *(() if is_picture(channels) else scan.ARRAYS))
    counts = {"folder": sum(listing.endings.get(ending, 0) for ending in pictures)}
    counts |= {kind: sum(listing.endings.get(ending, 0) for ending in endings) for kind, endings in _KINDS.items()}
    present = {kind: count for kind, count in counts.items() if count}
    if len(present) > 1:
        found = ", ".join(
            f"{count} {_CALLED[kind] if kind != 'arrow' else '.arrow files'}" for kind, count in present.items()
        )
        raise DataError(
            f"{path} holds several kinds of data ({found}); give the folder of one of them, or a pattern such as "
            f"{path}/*.tar"
        )
    return next(iter(present), "folder")


def _refuse_several_splits(files: Sequence[Path], paths: Sequence[Path]) -> None:
    """Hub folders hold training and validation files side by side; only their names tell them apart.

    Raises:
        DataError: a folder was given, and the files in it are of several splits.
    """
    if not any(path.is_dir() for path in paths):
        return
    splits = {match.group(1): file for file in files if (match := _SPLIT.search(file.name.lower()))}
    if len(splits) > 1:
        one = next(iter(splits.values()))
        pattern = one.parent / f"{_SPLIT.search(one.name.lower()).group(1)}*{one.suffix}"  # type: ignore[union-attr]
        raise DataError(
            f"{one.parent} holds several splits ({', '.join(sorted(splits))}); name the files of one, for example "
            f"'{pattern}'"
        )
