"""Images in tables: parquet files as on the Hugging Face hub, and folders that ``datasets`` saved."""

from __future__ import annotations

import json
import os
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mae_transfer.data.labels import check_labels
from mae_transfer.data.names import Parts
from mae_transfer.data.source import Source, read_file
from mae_transfer.errors import DataError, require

ROW_GROUP_BYTES = 256 * 2**20  # of row groups that each process keeps
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")


class _Table(Source):
    """Rows of an image column and perhaps a label column, file after file."""

    def __init__(self, files: Sequence[Path], *, channels: int, floats: bool) -> None:
        super().__init__(channels=channels, floats=floats)
        self.files = list(files)
        schema = self._schema(self.files[0])
        self._features = _hub_features(schema)
        self._image = _image_column(schema, self._features, self.files[0])
        self._label = _label_column(schema, self._features)
        for file in self.files[1:]:
            if self._image not in self._schema(file).names:
                raise DataError(f"{file} has no column {self._image!r}, which {self.files[0]} has")

    @abstractmethod
    def _schema(self, file: Path) -> Any:
        """The Arrow schema of a file."""

    @abstractmethod
    def _value(self, index: int) -> tuple[Path, Any]:
        """The file that a row is in, and its image: bytes, or {bytes, path}."""

    def name(self, index: int) -> str:
        file, row = self.place(index)
        return f"{file}#{row}"

    def encoded(self, index: int) -> bytes:
        file, value = self._value(index)
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return read_file(file.parent / value["path"])
            value = value.get("bytes")
        if value is None:
            raise DataError(f"cannot read image {self.name(index)}: the row holds none")
        return bytes(value)

    @abstractmethod
    def _column(self, name: str) -> np.ndarray:
        """All values of a column of whole numbers, int64; −1 where a row has none."""

    @cached_property
    def _labels(self) -> np.ndarray | None:
        return None if self._label is None else check_labels(self._column(self._label), self.classes, self.name)

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    @property
    def classes(self) -> list[str] | None:
        feature = self._features.get(self._label, {}) if self._label else {}
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, dict):  # as YAML has it: {'0': 'cat', …}
            names = [names[key] for key in sorted(names, key=int)]
        return list(names) if names else None


class ParquetImages(_Table):
    """Parquet files, read a row group at a time; the last few row groups are kept.

    Raises:
        DataError: not parquet, no image column, no rows. MissingDependencyError: pyarrow is not installed.
    """

    def __init__(self, files: Sequence[Path], *, channels: int = 3, floats: bool = True) -> None:
        self._parquet = require("pyarrow.parquet", "parquet")
        super().__init__(files, channels=channels, floats=floats)
        # Row groups in order: the number of the file, the group in it, and the row of the file that it starts with.
        self._groups: list[tuple[int, int, int]] = []
        lengths: list[int] = []
        for number, file in enumerate(self.files):
            metadata, first = self._parquet.read_metadata(file), 0
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, first))
                lengths.append(metadata.row_group(group).num_rows)
                first += lengths[-1]
        self._parts = Parts(lengths)
        if not len(self):
            raise DataError(f"no images found in {self.files[0]}: the table has no rows")
        self._reset()

    def _reset(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()  # row group -> its images, the one used longest ago first
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        hidden = ("_kept", "_lock", "_parquet")
        return {key: value for key, value in self.__dict__.items() if key not in hidden}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._parquet = require("pyarrow.parquet", "parquet")
        self._reset()

    def _schema(self, file: Path) -> Any:
        try:
            return self._parquet.read_schema(file)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read parquet file {file}: {error}") from error

    def __len__(self) -> int:
        return len(self._parts)

    def place(self, index: int) -> tuple[str, int]:
        group, row = self._parts.locate(index)
        number, _, first = self._groups[group]
        return str(self.files[number]), first + row

    def _value(self, index: int) -> tuple[Path, Any]:
        group, row = self._parts.locate(index)
        file = self.files[self._groups[group][0]]
        try:
            with self._lock:
                return file, self._images(group)[row].as_py()
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read image {self.name(index)}: {error}") from error

    def _images(self, group: int) -> Any:
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, place, _ = self._groups[group]
        # Opened anew and mapped: nothing is shared with a process that this one came from.
        with self._parquet.ParquetFile(self.files[number], memory_map=True) as file:
            table = file.read_row_group(place, columns=[self._image], use_threads=False)
        images = self._kept[group] = table.column(self._image)
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > ROW_GROUP_BYTES:
            self._kept.popitem(last=False)
        return images

    def _column(self, name: str) -> np.ndarray:
        return _whole_numbers(self._parquet.read_table(file, columns=[name]).column(name) for file in self.files)


class ArrowImages(_Table):
    """What ``datasets.Dataset.save_to_disk`` wrote: Arrow streams, mapped into memory, every row within reach.

    Raises:
        DataError: not such a file, no image column, no rows. MissingDependencyError: pyarrow is not installed.
    """

    def __init__(self, files: Sequence[Path], *, channels: int = 3, floats: bool = True) -> None:
        self._open(files)
        super().__init__(files, channels=channels, floats=floats)
        self._parts = Parts(table.num_rows for table in self._tables)
        if not len(self):
            raise DataError(f"no images found in {self.files[0]}: the table has no rows")

    def _open(self, files: Sequence[Path]) -> None:
        self._arrow = require("pyarrow", "parquet")
        self._tables = [self._read(file) for file in files]

    def _read(self, file: Path) -> Any:
        try:
            mapped = self._arrow.memory_map(os.fspath(file))
            try:
                return self._arrow.ipc.open_stream(mapped).read_all()
            except self._arrow.ArrowInvalid:
                return self._arrow.ipc.open_file(mapped).read_all()
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read arrow file {file}: {error}") from error

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_tables", "_arrow")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open(self.files)

    def _schema(self, file: Path) -> Any:
        return self._tables[self.files.index(file)].schema

    def __len__(self) -> int:
        return len(self._parts)

    def place(self, index: int) -> tuple[str, int]:
        file, row = self._parts.locate(index)
        return str(self.files[file]), row

    def _value(self, index: int) -> tuple[Path, Any]:
        file, row = self._parts.locate(index)
        return self.files[file], self._tables[file].column(self._image)[row].as_py()

    def _column(self, name: str) -> np.ndarray:
        return _whole_numbers(table.column(name) for table in self._tables)


def _whole_numbers(columns: Iterable[Any]) -> np.ndarray:
    """Arrow columns one after the other, int64; −1 for null."""
    return np.concatenate([column.cast("int64").fill_null(-1).to_numpy() for column in columns])


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``datasets`` saved, in order.

    Raises:
        DataError: a folder of several splits, or one with files missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise DataError(
            f"{folder} holds the splits {', '.join(splits)}; name one of them: {folder / (splits or ['train'])[0]}"
        )
    state = folder / "state.json"
    if state.is_file():
        content = json.loads(state.read_text(encoding="utf-8"))
        if content.get("_indices_data_files"):
            raise DataError(f"{folder} was saved with indices of rows; save it again after .flatten_indices()")
        files = [folder / entry["filename"] for entry in content.get("_data_files", [])]
    else:
        files = sorted(folder.glob("*.arrow"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{folder} lacks {', '.join(missing) or 'its .arrow files'}")
    return files


def _hub_features(schema: Any) -> dict[str, Any]:
    """What ``datasets`` notes down about the columns; empty where it did not write the file."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _image_column(schema: Any, features: dict[str, Any], file: Path) -> str:
    noted = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
    kinds = {field.name: str(field.type) for field in schema}
    structs = [name for name, kind in kinds.items() if kind.startswith("struct<") and "bytes: " in kind]
    binaries = [name for name, kind in kinds.items() if kind in ("binary", "large_binary")]
    candidates = [name for name in noted if name in kinds] or structs or binaries
    preferred = [name for name in _IMAGE_COLUMNS if name in candidates]
    if preferred or len(candidates) == 1:
        return (preferred or candidates)[0]
    raise DataError(
        f"{file} has {'no column of images' if not candidates else 'several columns of images'} (its columns: "
        f"{', '.join(f'{name}: {kind}' for name, kind in kinds.items())}); expected one called 'image'"
    )


def _label_column(schema: Any, features: dict[str, Any]) -> str | None:
    integers = [field.name for field in schema if str(field.type).lstrip("u").startswith("int")]
    noted = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
    preferred = [name for name in _LABEL_COLUMNS if name in integers]
    noted = [name for name in noted if name in integers]
    return next(iter([name for name in preferred if name in noted] or noted or preferred), None)
