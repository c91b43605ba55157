from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from mae_transfer.data import scan
from mae_transfer.errors import DataError


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are kept however short they are."""
    monkeypatch.setattr(scan, "WORTH_KEEPING", 1)


def files_below(root: Path, *names: str) -> Path:
    """Empty files, in folders that have not been touched for a while."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    settle(root)
    return root


def settle(root: Path, seconds: float = 60) -> None:
    """Let ``seconds`` pass since the last change below ``root``."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        status = folder.stat()
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns - int(seconds * 1e9)))


def found(root: Path, cache: Path | None = None) -> list[str]:
    return list(scan.list_files(root, cache=cache).names)


def test_order_is_that_of_paths(tmp_path: Path) -> None:
    names = [
        "b.jpg",
        "a/z.jpg",
        "a.b/c.jpg",
        "a b/c.png",
        "A/x.JPG",
        "a/b/c.tif",
        "a-1/x.npy",
        "shard.tar",
        "t.parquet",
    ]
    files_below(tmp_path, *names, "notes.txt", ".hidden.jpg", ".git/x.jpg")
    expected = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path / name for name in names)]
    assert found(tmp_path) == expected
    assert scan.list_files(tmp_path).endings[".jpg"] == 4


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    files_below(tmp_path / "data", "a/x.jpg")
    files_below(tmp_path / "elsewhere", "y.jpg")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling").symlink_to(tmp_path / "nowhere")
    assert found(tmp_path / "data") == ["a/x.jpg", "b/y.jpg"]


@pytest.mark.usefixtures("kept")
def test_a_kept_list_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = files_below(tmp_path / "data", "a/x.jpg", "b/y.png"), tmp_path / "cache"
    first = scan.list_files(root, cache=cache)
    monkeypatch.setattr(scan, "_walk", None)
    again = scan.list_files(root, cache=cache)
    assert list(again.names) == list(first.names) == ["a/x.jpg", "b/y.png"]
    assert dict(again.endings) == dict(first.endings) == {".jpg": 1, ".png": 1}


@pytest.mark.usefixtures("kept")
def test_whatever_happens_to_the_files_a_kept_list_is_never_wrong(tmp_path: Path) -> None:
    root, cache = files_below(tmp_path / "data", "a/x.jpg", "b/y.png", "b/c/z.png"), tmp_path / "cache"
    changes = [
        lambda: (root / "a" / "new.jpg").touch(),
        lambda: (root / "a" / "x.jpg").unlink(),
        lambda: (root / "b" / "y.png").rename(root / "b" / "renamed.png"),
        lambda: (root / "b" / "c").rename(root / "b" / "d"),
        lambda: files_below(root / "e", "f/g.jpg"),
        lambda: (root / "b" / "renamed.png").rename(root / "a" / "moved.png"),
        lambda: (root / "e").rename(tmp_path / "gone"),
        lambda: (root / "link").symlink_to(tmp_path / "gone"),
        lambda: (tmp_path / "gone" / "f" / "late.jpg").touch(),
    ]
    for change in changes:
        assert found(root, cache) == found(root)  # read and, where it is settled, kept
        change()
        assert found(root, cache) == found(root)
        settle(root)
        settle(tmp_path / "gone") if (tmp_path / "gone").exists() else None
    assert (root / "link" / "f" / "late.jpg").exists() and "link/f/late.jpg" in found(root, cache)


@pytest.mark.usefixtures("kept")
def test_a_list_made_right_after_a_change_is_not_kept(tmp_path: Path) -> None:
    """A file added within the clock's granularity would go unnoticed."""
    root = files_below(tmp_path / "data", "x.jpg")
    (root / "y.jpg").touch()
    scan.list_files(root, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_short_lists_are_not_kept(tmp_path: Path) -> None:
    scan.list_files(files_below(tmp_path / "data", "x.jpg"), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_or_foreign_list_is_set_aside(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    root, cache = files_below(tmp_path / "data", "x.jpg"), tmp_path / "cache"
    scan.list_files(root, cache=cache)
    (path,) = cache.iterdir()
    if damage is None:  # another folder's list under this one's name
        other = files_below(tmp_path / "other", "y.jpg")
        scan.list_files(other, cache=cache)
        next(entry for entry in cache.iterdir() if entry != path).replace(path)
    else:
        path.write_bytes(damage)
    assert found(root, cache) == ["x.jpg"]
    assert ("cannot be read" in caplog.text) == (damage is not None)


@pytest.mark.usefixtures("kept")
def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    root = files_below(tmp_path / "data", "x.jpg")
    (tmp_path / "file").touch()
    assert found(root, tmp_path / "file" / "cache") == ["x.jpg"]


def test_where_lists_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scan.user_cache() == tmp_path / "mae-transfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert scan.user_cache() == tmp_path / ".cache" / "mae-transfer"


def test_a_long_scan_says_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_REPORT_SECONDS", -1.0)
    caplog.set_level(logging.INFO)
    scan.list_files(files_below(tmp_path, "a/x.jpg", "a/y.jpg"))
    assert f"looking for images below {tmp_path}: 2 so far" in caplog.text


def test_a_root_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read folder"):
        scan.list_files(tmp_path / "absent")
