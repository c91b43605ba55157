from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mae_transfer.data.source import CachedImages, ImageFolder, scan_folders
from mae_transfer.errors import DataError
from tests.pictures import write_pictures


def test_nested_folders_and_several_roots_in_order(tmp_path: Path) -> None:
    write_pictures(tmp_path / "b" / "deep" / "deeper", 2)
    write_pictures(tmp_path / "a", 1)
    write_pictures(tmp_path / "b" / ".hidden", 1)
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "UPPER.JPG").write_bytes(b"")
    names = [str(path.relative_to(tmp_path)) for path in scan_folders([tmp_path / "b", tmp_path / "a"])]
    assert names == ["b/UPPER.JPG", "b/deep/deeper/000.png", "b/deep/deeper/001.png", "a/000.png"]


def test_what_cannot_be_a_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for roots, message in (
        ([], "no image folder given"),
        ([tmp_path / "absent"], "does not exist"),
        ([tmp_path / "file"], "is not a folder"),
        ([tmp_path / "empty"], "no images found"),
    ):
        with pytest.raises(DataError, match=message):
            scan_folders(roots)


def test_the_cache_gives_the_same_images_and_the_same_errors(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    write_pictures(tmp_path / "wide", 2, size=(10, 60))
    (tmp_path / "broken.png").write_bytes(b"no image")
    source = ImageFolder([tmp_path])
    cached = CachedImages(source, limit_bytes=2**20)
    assert len(cached) == len(source) == 6
    assert cached.num_bytes == 3 * 40 * 48 * 3 + 2 * 10 * 60 * 3
    for index, path in enumerate(source.paths):
        if path.name == "broken.png":
            for images in (source, cached):
                with pytest.raises(DataError, match=r"broken\.png"):
                    images[index]
        else:
            np.testing.assert_array_equal(np.asarray(cached[index]), np.asarray(source[index]))


def test_grayscale_cache(tmp_path: Path) -> None:
    source = ImageFolder([write_pictures(tmp_path, 2)], channels=1)
    assert CachedImages(source, limit_bytes=2**20)[1].shape == (40, 48, 1)


def test_a_cache_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"raise data\.cache_gib"):
        CachedImages(ImageFolder([write_pictures(tmp_path, 3)]), limit_bytes=10_000)
