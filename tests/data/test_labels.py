"""Labels that are no class's, and class folders that cannot be one."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mae_transfer.data.choice import matching_labels
from mae_transfer.data.find import open_source
from mae_transfer.errors import ConfigError, DataError
from tests.data.test_shards import samples, write_shard
from tests.pictures import picture, write_pictures


def write_table(path: Path, labels: list[int | None], *, names: list[str] | None) -> Path:
    """A parquet file as on the Hugging Face hub."""
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    images = pa.array([{"bytes": file.getvalue()}] * len(labels), pa.struct([("bytes", pa.binary())]))
    content = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    note = json.dumps({"info": {"features": features if names else {}}})
    pq.write_table(content.replace_schema_metadata({"huggingface": note}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("names", [["cat", "dog"], None])
@pytest.mark.parametrize("missing", [-1, None])
def test_a_split_without_labels_is_refused(tmp_path: Path, names: list[str] | None, missing: int | None) -> None:
    path = write_table(tmp_path / "test.parquet", [0, 1, 1, missing, missing], names=names)
    source = open_source([path])
    with pytest.raises(DataError, match=r"2 of 5 labels .* is -1, of .*test\.parquet#3; .*published without labels"):
        source.labels  # noqa: B018


def test_labels_without_a_name_are_refused(tmp_path: Path) -> None:
    source = open_source([write_table(tmp_path / "t.parquet", [0, 2, 1], names=["cat", "dog"])])
    with pytest.raises(DataError, match=r"1 of 3 labels .* is 2, of .*#1; expected 0 to 1, as 2 classes are named\."):
        source.labels  # noqa: B018
    unnamed = open_source([write_table(tmp_path / "u.parquet", [0, 2, 1], names=None)])
    assert unnamed.labels is not None and unnamed.labels.tolist() == [0, 2, 1]


def test_negative_labels_of_shards_are_refused(tmp_path: Path) -> None:
    members = samples(0, 3) | {"train/00001.cls": b"-1"}
    with pytest.raises(DataError, match=r"1 of 3 labels .* is -1, of .*0\.tar::train/00001\.png; expected 0 or more"):
        open_source([write_shard(tmp_path / "0.tar", members)]).labels  # noqa: B018


def test_class_folders_without_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for folder in ("a/cat", "a/dog", "b/owl"):
        write_pictures(tmp_path / folder, 1)
    for folder in ("a/empty", "b/.hidden"):
        (tmp_path / folder).mkdir()
    (tmp_path / "b" / "cat").mkdir()  # there are cats in the other root
    (tmp_path / "b" / "notes").mkdir()
    (tmp_path / "b" / "notes" / "a.txt").touch()
    source = open_source([tmp_path / "a", tmp_path / "b"])
    assert source.classes == ["cat", "dog", "owl"] and source.labels is not None
    assert [record.getMessage() for record in caplog.records] == [
        f"class folder {tmp_path / folder} holds no images that can be used; it is left out"
        for folder in ("a/empty", "b/notes")
    ]


def test_class_folders_whose_name_is_no_text_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "tea", 1)
    try:
        os.rename(write_pictures(tmp_path / "coffee", 1), os.fsencode(tmp_path) + b"/caf\xe9")  # noqa: PTH104
    except OSError:
        pytest.skip("the file system takes no such names")
    source = open_source([tmp_path])
    assert len(source) == 2
    with pytest.raises(DataError, match=r"class folder .*caf\\xe9: its name is not UTF-8; rename it"):
        source.labels  # noqa: B018


def test_a_single_class_can_be_judged_and_not_learned(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "val/dog"):
        write_pictures(tmp_path / folder, 1)
    train, val = open_source([tmp_path / "train"]), open_source([tmp_path / "val"])
    assert matching_labels(train, val, keys=("a", "b"))[1].tolist() == [1]
    with pytest.raises(ConfigError, match=r"a has only one class folder \(dog\); a folder .* for each class"):
        matching_labels(val, val, keys=("a", "b"))
