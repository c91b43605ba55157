"""WebDataset shards: tar files read at any place, by an index of where their members lie."""

from __future__ import annotations

import json
import logging
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_transfer.data import scan
from mae_transfer.data.decode import is_picture
from mae_transfer.data.labels import check_labels
from mae_transfer.data.names import Names, Parts
from mae_transfer.data.source import Source
from mae_transfer.errors import DataError

logger = logging.getLogger(__name__)

_NO_LABEL = -(2**63)
_OPEN_SHARDS = 32  # of each process, at a time
_LABELS = ("label", "cls", "class", "target")  # where a sample's .json may say it


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The image members of a shard, in the order they lie in it.

    Attributes:
        state: (size, time of change in ns) of the file.
        names: of the members.
        offsets, sizes: (M,) int64, bytes.
        labels: (M,) int64, ``_NO_LABEL`` where there is none.
    """

    state: tuple[int, int]
    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


class TarShards(Source):
    """Samples of WebDataset shards, shard after shard, in the order of their members.

    Every member whose ending is that of an image is a sample. Its label is the whole number in a member ``KEY.cls``, or
    in ``KEY.json`` under ``label`` or ``cls``, where KEY is the member's path up to the first dot of its last part.

    Args:
        shards: uncompressed tar files, in the order of their samples' numbers.
        cache: the folder that keeps indices; None for neither reading nor writing one.

    Raises:
        DataError: a file that is no tar file or is cut off, a compressed one, or no images in any of them.
    """

    def __init__(
        self, shards: Sequence[Path], *, channels: int = 3, floats: bool = True, cache: Path | None = None
    ) -> None:
        super().__init__(channels=channels, floats=floats)
        self.shards = list(shards)
        endings = scan.IMAGES if is_picture(channels) else (*scan.IMAGES, *scan.ARRAYS)
        self._indices = index_shards(self.shards, endings, cache=cache)
        self._parts = Parts(len(index.names) for index in self._indices)
        if not len(self._parts):
            raise DataError(f"no images found in {self.shards[0]} (looked for {', '.join(endings)})")
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the one used longest ago first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._parts)

    def name(self, index: int) -> str:
        shard, member = self._parts.locate(index)
        return f"{self.shards[shard]}::{self._indices[shard].names[member]}"

    def place(self, index: int) -> tuple[str, int]:
        shard, member = self._parts.locate(index)
        return str(self.shards[shard]), member

    def encoded(self, index: int) -> bytes:
        shard, member = self._parts.locate(index)
        part = self._indices[shard]
        size = int(part.sizes[member])
        try:
            # At a place given with the call: processes that inherit the open file do not disturb one another.
            with self._lock:
                data = os.pread(self._descriptor(shard), size, int(part.offsets[member]))
        except OSError as error:
            raise DataError(f"cannot read image {self.name(index)}: {error.strerror}") from error
        if len(data) != size:
            raise DataError(f"cannot read image {self.name(index)}: the shard has become shorter")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        if len(self._files) > _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _files=OrderedDict(), _lock=threading.Lock())

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    @property
    def labels(self) -> np.ndarray | None:
        labels = np.concatenate([index.labels for index in self._indices])
        return None if (labels == _NO_LABEL).any() else check_labels(labels, None, self.name)


def index_shards(shards: Sequence[Path], endings: Sequence[str], *, cache: Path | None) -> list[ShardIndex]:
    """Where the images of each shard lie. Only shards that are new or have changed are read again."""
    # The endings count: with others, other members are samples.
    key = "\n".join([*(str(shard.resolve()) for shard in shards), *endings])
    known = _load(cache, key, len(shards)) if cache is not None else [None] * len(shards)
    result: list[ShardIndex] = []
    started, read = time.time_ns(), 0
    with scan.Progress("indexing shards") as progress:
        for shard, index in zip(shards, known, strict=True):
            state = _state(shard)
            if index is None or index.state != state:
                index, read = _read_index(shard, state, tuple(endings)), read + 1
                progress.add(len(index.names))
            result.append(index)
    settled = all(index.state[1] < started - scan.SETTLED_NS for index in result)
    if cache is not None and read and settled and sum(len(index.names) for index in result) >= scan.WORTH_KEEPING:
        _keep(cache, key, result)
    return result


def _state(shard: Path) -> tuple[int, int]:
    try:
        status = shard.stat()
    except OSError as error:
        raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _read_index(shard: Path, state: tuple[int, int], endings: tuple[str, ...]) -> ShardIndex:
    names: list[str] = []
    places: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, mode="r:") as archive:
            for member in archive:
                base = os.path.basename(member.name)  # noqa: PTH119 - names in an archive are no paths here
                if not member.isfile() or base.startswith(".") or member.sparse is not None:
                    continue
                ending = os.path.splitext(base)[1].lower()  # noqa: PTH122
                if ending in endings:
                    names.append(member.name)
                    places.append((member.offset_data, member.size))
                elif ending in (".cls", ".json"):
                    file = archive.extractfile(member)
                    label = _label(file.read(), ending) if file is not None else None
                    if label is not None:
                        labels[_key(member.name)] = label
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every member's description
            _check_end(shard, archive.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"cannot read shard {shard}: {error or 'it is cut off'}. Shards must be whole, uncompressed tar files "
            "(gzip allows no reading at any place: gunzip them)"
        ) from error
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return ShardIndex(
        state=state,
        names=Names(names),
        offsets=offsets,
        sizes=sizes,
        labels=np.array([labels.get(_key(name), _NO_LABEL) for name in names], np.int64),
    )


def _check_end(shard: Path, offset: int) -> None:
    """After the last member come zeros; anything else is a damaged header, which tarfile takes for the end."""
    with shard.open("rb") as file:
        file.seek(offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"damaged at byte {offset}")


def _key(member: str) -> str:
    folder, _, base = member.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _label(content: bytes, ending: str) -> int | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    if ending == ".json":
        value = next((value[key] for key in _LABELS if key in value), None) if isinstance(value, dict) else None
    return value if type(value) is int else None


def _keep(cache: Path, key: str, indices: Sequence[ShardIndex]) -> None:
    names = Names(name for index in indices for name in index.names)
    arrays: dict[str, np.ndarray] = {
        "states": np.array([index.state for index in indices], np.int64),
        "counts": np.array([len(index.names) for index in indices], np.int64),
        "names": names.block,
        "name_ends": names.ends,
        "offsets": np.concatenate([index.offsets for index in indices]),
        "sizes": np.concatenate([index.sizes for index in indices]),
        "labels": np.concatenate([index.labels for index in indices]),
    }
    scan.keep_arrays(cache, "shards", key, arrays)


def _load(cache: Path, key: str, count: int) -> list[ShardIndex | None]:
    arrays = scan.load_arrays(cache, "shards", key)
    if arrays is None or len(arrays["counts"]) != count:
        return [None] * count
    names = Names.from_arrays(arrays["names"], arrays["name_ends"])
    result: list[ShardIndex | None] = []
    start = 0
    for (size, changed), length in zip(arrays["states"].tolist(), arrays["counts"].tolist(), strict=True):
        part = slice(start, start + length)
        result.append(
            ShardIndex(
                state=(size, changed),
                names=names.part(part.start, part.stop),
                offsets=arrays["offsets"][part],
                sizes=arrays["sizes"][part],
                labels=arrays["labels"][part],
            )
        )
        start += length
    return result
