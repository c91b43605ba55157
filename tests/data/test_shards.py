from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mae_transfer.data import scan, shards
from mae_transfer.data.shards import TarShards
from mae_transfer.errors import DataError
from tests.pictures import picture


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    os.utime(path, (1e9, 1e9))
    return path


def samples(first: int, count: int, **extra: str) -> dict[str, bytes]:
    """Samples as WebDataset has them: a picture and its label."""
    members = {}
    for number in range(first, first + count):
        members[f"train/{number:05d}.png"] = encoded(number)
        members[f"train/{number:05d}.cls"] = str(number % 3).encode()
    return members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_several_shards_in_any_order(tmp_path: Path, form: int) -> None:
    long = "deep/" * 30 + "é" * 30 if form != tarfile.USTAR_FORMAT else "deep/name"
    paths = [
        write_shard(tmp_path / "0.tar", samples(0, 3), format=form),
        write_shard(tmp_path / "1.tar", {"notes.txt": b"no picture", **samples(3, 2)}, format=form),
        write_shard(tmp_path / "2.tar", {f"{long}.png": encoded(5), f"{long}.cls": b"2"}, format=form),
    ]
    source = TarShards(paths)
    assert len(source) == 6
    for index in (5, 0, 3, 2, 4, 1, 5):
        np.testing.assert_array_equal(source[index], np.asarray(picture(index)))
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels, np.arange(6) % 3)
    assert source.name(3) == f"{paths[1]}::train/00003.png"
    with pytest.raises(IndexError):
        source.name(6)


def test_labels_in_json_or_none(tmp_path: Path) -> None:
    members = {"a.png": encoded(0), "a.json": json.dumps({"label": 4, "caption": "x"}).encode(), "b.png": encoded(1)}
    assert TarShards([write_shard(tmp_path / "0.tar", members)]).labels is None
    members["b.json"] = json.dumps({"cls": 5}).encode()
    labels = TarShards([write_shard(tmp_path / "1.tar", members)]).labels
    assert labels is not None and labels.tolist() == [4, 5]


def test_threads_copies_and_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    source = TarShards([write_shard(tmp_path / f"{i}.tar", {"a.png": encoded(i)}) for i in range(6)])
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - as spawned workers get it
    order = [i % 6 for i in range(120)]
    with ThreadPoolExecutor(4) as pool:
        for index, pixels in zip(order, pool.map(source.__getitem__, order), strict=True):
            np.testing.assert_array_equal(pixels, copy[index])


def test_shards_that_cannot_be_read_say_which_and_why(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", samples(0, 3)).read_bytes()
    (tmp_path / "text.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "empty.tar").touch()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 - 300])
    (tmp_path / "damaged.tar").write_bytes(bytes(whole[:512]) + whole[512:].replace(b"train/00001", b"train/0000x", 1))
    with tarfile.open(tmp_path / "zipped.tar", "w:gz"):
        pass
    for name in ("text", "empty", "cut", "damaged", "zipped"):
        with pytest.raises(DataError, match=rf"cannot read shard .*{name}\.tar"):
            TarShards([tmp_path / f"{name}.tar"])
    with pytest.raises(DataError, match="no images found"):
        TarShards([write_shard(tmp_path / "bare.tar", {"a.txt": b""})])


def test_a_damaged_member_is_one_unreadable_image(tmp_path: Path) -> None:
    members = {**samples(0, 1), "broken.jpg": b"text", **samples(2, 1)}
    source = TarShards([write_shard(tmp_path / "0.tar", members)])
    with pytest.raises(DataError, match=r"0\.tar::broken\.jpg"):
        source[1]
    np.testing.assert_array_equal(source[2], np.asarray(picture(2)))


def test_a_shard_that_shrinks_during_the_run_is_noticed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", samples(0, 3))
    source = TarShards([path])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="shorter"):
        source[2]


def test_an_index_is_kept_and_only_changed_shards_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "WORTH_KEEPING", 1)
    paths = [write_shard(tmp_path / "data" / f"{i}.tar", samples(3 * i, 3)) for i in range(3)]
    read: list[Path] = []
    original = shards._read_index

    def counted(shard: Path, *arguments: object) -> shards.ShardIndex:
        read.append(shard)
        return original(shard, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "_read_index", counted)
    first = TarShards(paths, cache=tmp_path / "cache")
    assert read == paths
    again = TarShards(paths, cache=tmp_path / "cache")
    assert read == paths
    for index in range(9):
        assert again.name(index) == first.name(index)
        np.testing.assert_array_equal(again[index], first[index])
    np.testing.assert_array_equal(again.labels, first.labels)
    write_shard(paths[1], samples(20, 4))
    changed = TarShards(paths, cache=tmp_path / "cache")
    assert read == [*paths, paths[1]] and len(changed) == 10
    np.testing.assert_array_equal(changed[4], np.asarray(picture(21)))
    # The same bytes written at another time are read again too; two channels make other members samples.
    os.utime(paths[0], (2e9 - 1e9 + 5, 1e9 + 5))
    TarShards(paths, cache=tmp_path / "cache")
    assert read[-1] == paths[0]
