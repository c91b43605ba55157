from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_transfer.data.source import CachedImages, ImageFolder, scan_folders
from mae_transfer.errors import DataError
from tests.pictures import picture, write_pictures


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


def test_labels_are_the_folders_below_the_roots(tmp_path: Path) -> None:
    for folder, count in (("a/dog", 2), ("a/cat/deep", 1), ("b/owl", 1), ("b/cat", 2)):
        write_pictures(tmp_path / folder, count)
    source = ImageFolder([tmp_path / "a", tmp_path / "b"])
    assert source.classes == ["cat", "dog", "owl"]
    assert source.labels is not None
    assert [source.classes[label] for label in source.labels] == ["cat", "dog", "dog", "cat", "cat", "owl"]
    cached = CachedImages(source, limit_bytes=2**20)
    assert cached.classes == source.classes and cached.labels is source.labels
    # Images outside of any folder are of no class; a single folder is one.
    assert ImageFolder([tmp_path / "b" / "cat"]).labels is None
    one = ImageFolder([tmp_path / "a" / "cat"])
    assert one.classes == ["deep"] and one.labels is not None and one.labels.tolist() == [0]
    write_pictures(tmp_path / "a", 1)
    assert ImageFolder([tmp_path / "a"]).labels is None


def test_any_kind_of_pixels_can_be_cached(tmp_path: Path) -> None:
    for number, kind in enumerate((np.uint8, np.uint16, np.float32)):
        values = np.random.default_rng(number).random((9 + number, 7, 4)) * 200
        np.save(tmp_path / f"{number}.npy", values.astype(kind))
    source = ImageFolder([tmp_path], channels=4)
    cached = CachedImages(source, limit_bytes=2**20)
    for index in range(3):
        np.testing.assert_array_equal(cached[index], source[index], strict=True)


def test_gray_photos_are_gray_in_three_channels(tmp_path: Path) -> None:
    picture(0).convert("L").save(tmp_path / "gray.jpg")
    pixels = ImageFolder([tmp_path])[0]
    with Image.open(tmp_path / "gray.jpg") as image:
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_files_that_vanish_are_unreadable(tmp_path: Path) -> None:
    source = ImageFolder([write_pictures(tmp_path, 2)])
    Path(source.name(1)).unlink()
    with pytest.raises(DataError, match=r"001\.png: No such file"):
        source[1]
