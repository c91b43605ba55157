from __future__ import annotations

import io
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from mae_transfer.data.decode import check_channels, decode_image, open_array, open_picture
from mae_transfer.errors import ConfigError, DataError, MissingDependencyError
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


def test_what_a_file_is_shows_in_its_bytes_not_in_its_name(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "image.png")
    (tmp_path / "image.png").rename(tmp_path / "image.jpg")
    pixels = open_picture((tmp_path / "image.jpg").read_bytes(), name="image.jpg").decode()
    np.testing.assert_array_equal(pixels, np.asarray(picture(0)))


BROKEN = {
    "empty": lambda: b"",
    "text": lambda: b"this is no picture",
    "cut off": lambda: as_file(picture(0), "JPEG")[:-200],
    "cut off in its header": lambda: as_file(picture(0), "JPEG")[:100],
    "cut off and padded": lambda: as_file(picture(0), "JPEG")[:-200] + bytes(200),
    "cut off png": lambda: as_file(picture(0), "PNG")[:-500],
    "cut off webp": lambda: as_file(picture(0), "WEBP")[:-500],
    "cut off tiff": lambda: as_file(picture(0), "TIFF")[:-500],
    "cut off array": lambda: as_array(np.zeros((9, 9, 3), np.uint8))[:-5],
    "huge png": lambda: huge_png(60000, 60000),
    "huge gif": lambda: as_file(picture(0), "GIF")[:6] + b"\xff\xff\xff\xff" + as_file(picture(0), "GIF")[10:],
    "huge array": lambda: huge_array((60000, 60000, 3)),
    "huge archive": lambda: as_archive(image=huge_array((60000, 60000, 3))),
    "array of objects": lambda: as_array(np.array([[{}, 1], [2, 3]], dtype=object)),
    "archive of several": lambda: as_archive(a=as_array(np.zeros((4, 4))), b=as_array(np.zeros((4, 4)))),
}


def as_file(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def as_array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def as_archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def huge_array(shape: tuple[int, ...]) -> bytes:
    """A header without the values that it announces."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(1000)


def huge_png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(100_000))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, body)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_broken_files_are_refused_by_name_at_once_and_without_much_memory(kind: str, channels: int) -> None:
    data = BROKEN[kind]()
    tracemalloc.start()
    before = time.perf_counter()
    try:
        with pytest.raises(DataError, match=r"folder/file\.jpg"):
            open_picture(data, channels=channels, name="folder/file.jpg").decode()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - before < 2
    assert peak < 50e6


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_of_any_kind_are_a_data_error_or_nothing(kind: str, seed: int) -> None:
    data = bytearray(as_file(picture(0), kind))
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, min(len(data), 400), 6):
        data[place] = rng.integers(256)
    try:
        open_picture(bytes(data), name="x").decode()
    except DataError:
        return


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, ">u2", ">f4", np.float64, np.float16])
@pytest.mark.parametrize("place", ["last", "first"])
def test_arrays_of_many_channels_are_taken_as_they_are(tmp_path: Path, dtype: str, place: str) -> None:
    values = (np.random.default_rng(0).random((20, 30, 5)) * 200).astype(dtype)
    stored = values if place == "last" else np.moveaxis(values, 2, 0)
    np.save(tmp_path / "image.npy", stored)
    np.savez_compressed(tmp_path / "image.npz", image=stored, mask=np.zeros(3))
    native = np.float32 if values.dtype.kind == "f" else values.dtype.newbyteorder("=")
    opened = [open_array(tmp_path / "image.npy", channels=5)]
    opened += [
        open_picture((tmp_path / name).read_bytes(), channels=5, name=name) for name in ("image.npy", "image.npz")
    ]
    for image in opened:
        pixels = image.decode()
        assert (image.height, image.width) == (20, 30) and pixels.dtype == native
        np.testing.assert_array_equal(pixels, values.astype(native))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("layout", ["contig", "separate", "pages"])
def test_tiff_of_many_channels(dtype: type, layout: str) -> None:
    values = (np.random.default_rng(0).random((20, 30, 6)) * 200).astype(dtype)
    file = io.BytesIO()
    planes = np.moveaxis(values, 2, 0)
    if layout == "pages":
        tifffile.imwrite(file, planes, photometric="minisblack")
    else:
        tifffile.imwrite(
            file,
            values if layout == "contig" else planes,
            photometric="minisblack",
            planarconfig=layout,
            compression="zlib",
        )
    pixels = open_picture(file.getvalue(), channels=6, name="image.tif").decode()
    np.testing.assert_array_equal(pixels, values, strict=True)


def test_sixteen_bits_a_colour_keep_their_upper_eight() -> None:
    values = (np.random.default_rng(0).random((20, 30, 3)) * 65535).astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb")
    np.testing.assert_array_equal(
        open_picture(file.getvalue(), name="image.tif").decode(), (values >> 8).astype(np.uint8)
    )


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 4), ("CMYK", 4), ("LA", 2)])
def test_image_files_of_exactly_as_many_channels(mode: str, channels: int) -> None:
    image = picture(0).convert(mode)
    data = as_file(image, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(open_picture(data, channels=channels, name="image").decode(), np.asarray(image))
    with pytest.raises(DataError, match=rf"has {channels} channels.*data\.channels=5" if mode != "CMYK" else "shape"):
        open_picture(data, channels=5, name="image")


def test_arrays_whose_meaning_is_not_known() -> None:
    for values, message in (
        (np.zeros((9, 9, 4), np.int32), "convert to uint8, uint16 or float32"),
        (np.zeros((9, 9, 3), np.uint8), r"shape \(9, 9, 3\); data\.channels=4 needs \(H, W, 4\)"),
        (np.zeros((0, 9, 4), np.uint8), "shape"),
    ):
        with pytest.raises(DataError, match=message):
            open_picture(as_array(values), channels=4, name="x")
    with pytest.raises(DataError, match=r"data\.mean=\[…\] data\.std"):
        open_picture(as_array(np.zeros((9, 9), np.float32)), channels=1, name="x", floats=False)


def test_tiff_without_tifffile_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[tiff\]'"):
        open_picture(as_file(picture(0).convert("CMYK"), "TIFF"), channels=4, name="x")
