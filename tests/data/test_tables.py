from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mae_transfer.data import tables
from mae_transfer.data.find import open_source
from mae_transfer.data.tables import ArrowImages, ParquetImages
from mae_transfer.errors import DataError, MissingDependencyError
from tests.pictures import picture

FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def table(first: int, count: int, *, noted: bool = True, columns: Any = None) -> pa.Table:
    """Rows as `datasets` writes them."""
    numbers = range(first, first + count)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    content = columns or {
        "image": pa.array([{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers], kind),
        "label": pa.array([i % 3 for i in numbers], pa.int64()),
    }
    made = pa.table(content)
    note = json.dumps({"info": {"features": FEATURES}})
    return made.replace_schema_metadata({"huggingface": note}) if noted else made


def write_arrow(path: Path, content: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=2)


def save_to_disk(folder: Path, parts: list[pa.Table]) -> Path:
    """What `datasets.Dataset.save_to_disk` leaves behind."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write_arrow(folder / name, part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def check_samples(source: tables._Table, count: int) -> None:
    assert len(source) == count
    for index in [*reversed(range(count)), 0, count - 1]:
        np.testing.assert_array_equal(source[index], np.asarray(picture(index)))
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, np.arange(count) % 3)
    assert source.classes == ["cat", "dog", "owl"]


def test_parquet_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(0, 5), tmp_path / "train-0.parquet", row_group_size=2)
    pq.write_table(table(5, 4), tmp_path / "train-1.parquet", row_group_size=3)
    source = open_source([tmp_path])
    assert isinstance(source, ParquetImages)
    check_samples(source, 9)
    assert source.name(6) == f"{tmp_path / 'train-1.parquet'}#1" and source.name(8).endswith("#3")
    check_samples(pickle.loads(pickle.dumps(source)), 9)  # noqa: S301 - as spawned workers get it
    # However little may be kept, the images are the same, and no more than that is kept.
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 1)
    fresh = ParquetImages(source.files)
    check_samples(fresh, 9)
    assert len(fresh._kept) == 1


def test_a_datasets_folder(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", [table(0, 5), table(5, 2)])
    source = open_source([folder])
    assert isinstance(source, ArrowImages)
    check_samples(source, 7)
    assert source.name(5).endswith("data-00001-of-00002.arrow#0")
    check_samples(pickle.loads(pickle.dumps(source)), 7)  # noqa: S301


def test_the_hub_cache_of_a_dataset_has_no_state(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", [table(0, 3)])
    (folder / "state.json").unlink()
    check_samples(open_source([folder]), 3)  # type: ignore[arg-type]


def test_images_that_lie_beside_the_table(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "0.png").write_bytes(encoded(0))
    rows = [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": "absent.png"}, None]
    pq.write_table(table(0, 0, columns={"image": pa.array(rows, kind)}), tmp_path / "t.parquet")
    source = ParquetImages([tmp_path / "t.parquet"])
    np.testing.assert_array_equal(source[0], np.asarray(picture(0)))
    for index in (1, 2):
        with pytest.raises(DataError, match=r"absent\.png|#2"):
            source[index]
    assert (source.labels is None and source.classes == ["cat", "dog", "owl"]) or source.classes is None


def test_plain_tables_by_the_names_of_their_columns(tmp_path: Path) -> None:
    columns = {
        "jpg": pa.array([encoded(0), encoded(1)], pa.large_binary()),
        "mask": pa.array([b"", b""], pa.binary()),
        "cls": pa.array([7, 8], pa.int32()),
    }
    pq.write_table(table(0, 0, noted=False, columns=columns), tmp_path / "t.parquet")
    source = ParquetImages([tmp_path / "t.parquet"])
    np.testing.assert_array_equal(source[1], np.asarray(picture(1)))
    assert source.labels is not None and source.labels.tolist() == [7, 8] and source.classes is None


def test_tables_that_are_no_source(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    pq.write_table(table(0, 0), tmp_path / "rows.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(20))
    for name, message in (
        ("text", "no column of images.*text: string"),
        ("rows", "no rows"),
        ("broken", "cannot read parquet"),
    ):
        with pytest.raises(DataError, match=message):
            ParquetImages([tmp_path / f"{name}.parquet"])


def test_folders_of_several_splits_or_with_gaps(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        pq.write_table(table(0, 2), tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"several splits \(train, validation\).*train\*\.parquet"):
        open_source([tmp_path / "hub"])
    check_samples(open_source([f"{tmp_path}/hub/train*.parquet"]), 2)  # type: ignore[arg-type]
    folder = save_to_disk(tmp_path / "dict" / "train", [table(0, 1), table(1, 1)])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"splits train, test; name one of them: .*dict/train"):
        open_source([tmp_path / "dict"])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="lacks data-00001-of-00002"):
        open_source([folder])


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[parquet\]'"):
        open_source([tmp_path])
