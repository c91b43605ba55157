from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_transfer.data.decode import check_channels, decode_image
from mae_transfer.errors import ConfigError, DataError
from tests.pictures import picture


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("L", "jpg"), ("LA", "png"), ("RGBA", "png"), ("P", "png")]
    + [("CMYK", "jpg"), ("CMYK", "tif"), ("1", "png"), ("RGB", "webp"), ("P", "gif"), ("RGB", "bmp")],
)
def test_every_kind_of_file_is_what_pillow_converts_it_to(tmp_path: Path, mode: str, ending: str) -> None:
    path = tmp_path / f"image.{ending}"
    picture(0).convert(mode).save(path)
    for channels, wanted in ((3, "RGB"), (1, "L")):
        decoded = decode_image(path, channels=channels)
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert(wanted)))


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        decoded = np.asarray(decode_image(tmp_path / name))
        np.testing.assert_array_equal(decoded, np.repeat((values // 256).astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:8, :12] = (255, 0, 0)  # red at the upper left
    stored = _as_a_camera_stores(upright, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "camera.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / "camera.png")), upright)


def _as_a_camera_stores(upright: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF's definition: which side of the picture row 0 and column 0 of the file are."""
    row_0, column_0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    stored = upright
    if row_0 in ("left", "right"):
        stored = stored.transpose(1, 0, 2)
    if row_0 in ("bottom", "right"):
        stored = stored[::-1]
    if column_0 in ("bottom", "right"):
        stored = stored[:, ::-1]
    return np.ascontiguousarray(stored)


def test_unreadable_files_say_which(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("cut.jpg", "text.png", "empty.png", "absent.png", "float.tif"):
        with pytest.raises(DataError, match=name):
            decode_image(tmp_path / name)


def test_channels_there_are_not() -> None:
    with pytest.raises(ConfigError, match=r"data\.channels=0"):
        check_channels(0)
