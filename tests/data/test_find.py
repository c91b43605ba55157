from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mae_transfer.data.find import open_source
from mae_transfer.data.shards import TarShards
from mae_transfer.data.source import ImageFolder
from mae_transfer.errors import DataError
from tests.data.test_shards import samples, write_shard
from tests.pictures import write_pictures


def test_a_folder_of_images_and_a_folder_of_shards(tmp_path: Path) -> None:
    assert isinstance(open_source([write_pictures(tmp_path / "images", 2)]), ImageFolder)
    write_shard(tmp_path / "shards" / "b" / "1.tar", samples(3, 1))
    first = write_shard(tmp_path / "shards" / "a.tar", samples(0, 3))
    source = open_source([tmp_path / "shards"])
    assert isinstance(source, TarShards) and len(source) == 4
    assert source.name(0).startswith(str(first))
    for path in (first, f"{tmp_path}/shards/*.tar"):
        assert len(open_source([path])) == 3


def test_mixtures_are_refused_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path / "both", 2)
    write_shard(tmp_path / "both" / "x.tar", samples(0, 1))
    with pytest.raises(DataError, match=r"both holds several kinds of data \(2 image files, 1 \.tar shards\)"):
        open_source([tmp_path / "both"])
    write_pictures(tmp_path / "images", 1)
    write_shard(tmp_path / "shards" / "x.tar", samples(0, 1))
    with pytest.raises(DataError, match=r"images holds image files; .*shards holds \.tar shards"):
        open_source([tmp_path / "images", tmp_path / "shards"])


def test_what_cannot_be_a_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    for roots, message in (
        ([], "no image folder given"),
        ([tmp_path / "absent"], "does not exist"),
        ([f"{tmp_path}/*.tar"], "does not exist"),
        ([tmp_path / "file.txt"], "is not a folder"),
        ([tmp_path / "empty"], "no images found"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(roots)


def test_messages_name_the_setting_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.val: image folder .*absent does not exist$"):
        open_source([tmp_path / "absent"], key="data.val")
    for split in ("train", "test"):
        write_shard(tmp_path / "images" / f"{split}.tar", samples(0, 1))
        (tmp_path / "tables").mkdir(exist_ok=True)
        (tmp_path / "tables" / f"{split}.parquet").touch()
    write_pictures(tmp_path / "pictures", 1)
    for roots in ([], [tmp_path / "absent"], [tmp_path / "tables"], [tmp_path / "images", tmp_path / "pictures"]):
        with pytest.raises(DataError) as error:
            open_source(roots)
        assert "data." not in str(error.value), "which setting it was is not known here"


def test_arrays_beside_images_are_no_pictures_but_are_measured_data(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    np.save(tmp_path / "features.npy", np.zeros((8, 8, 5), np.float32))
    assert len(open_source([tmp_path])) == 2
    measured = open_source([tmp_path], channels=5)
    assert [Path(measured.name(i)).name for i in range(3)] == ["000.png", "001.png", "features.npy"]
    assert measured[2].shape == (8, 8, 5)
    with pytest.raises(DataError, match=r"000\.png has 3 channels"):
        measured[0]
    np.save(tmp_path / "alone.npy", np.zeros((8, 9, 3), np.uint8))
    (tmp_path / "arrays").mkdir()
    (tmp_path / "alone.npy").rename(tmp_path / "arrays" / "alone.npy")
    assert open_source([tmp_path / "arrays"])[0].shape == (8, 9, 3)
