from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_transfer.data import jpeg
from mae_transfer.data.decode import Jpeg, open_picture
from mae_transfer.errors import DataError
from tests.pictures import picture


def encoded(size: tuple[int, int] = (75, 100), *, mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """A picture as a JPEG file."""
    file = io.BytesIO()
    picture(seed, size).convert(mode).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """(H, W, C): the oracle."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def header_of(data: bytes) -> jpeg.JpegHeader:
    header = jpeg.read_header(data, name="test")
    assert header is not None
    return header


KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "gray": {"mode": "L"},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "own Huffman tables": {"optimize": True},
    "with a profile": {"icc_profile": b"0" * 3000},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(75, 100), (64, 64), (9, 7), (129, 33)])
def test_every_row_that_is_asked_for_is_pillows_bit_for_bit(kind: str, size: tuple[int, int]) -> None:
    data = encoded(size, **KINDS[kind])
    header, whole = header_of(data), by_pillow(data)
    assert (header.height, header.width, header.components) == whole.shape
    for bottom in range(1, size[0] + 1):
        pixels = jpeg.decode(data, header, bottom=bottom, name="test")
        assert pixels.shape[0] >= bottom
        np.testing.assert_array_equal(pixels[:bottom], whole[:bottom])


def test_rows_below_are_not_decoded() -> None:
    data = encoded((400, 300))
    assert len(jpeg.decode(data, header_of(data), bottom=100, name="test")) < 150


@pytest.mark.parametrize("kind", ["4:2:0", "gray", "progressive"])
@pytest.mark.parametrize("size", [(120, 160), (75, 101)])
def test_shrinking_is_pillows_draft_bit_for_bit(kind: str, size: tuple[int, int]) -> None:
    data = encoded(size, **KINDS[kind])
    header = header_of(data)
    for shrink in jpeg.SHRINKS:
        with Image.open(io.BytesIO(data)) as image:
            image.draft(None, (size[1] // shrink, size[0] // shrink))
            drafted = np.asarray(image).reshape(*image.size[::-1], -1)
        assert drafted.shape[:2] == (-(-size[0] // shrink), -(-size[1] // shrink))
        np.testing.assert_array_equal(
            jpeg.decode(data, header, bottom=size[0], shrink=shrink, name="test"), drafted, strict=True
        )
        upper = jpeg.decode(data, header, bottom=size[0] // 2, shrink=shrink, name="test")
        rows = -(-(size[0] // 2) // shrink)
        np.testing.assert_array_equal(upper[:rows], drafted[:rows])


def test_without_simplejpeg_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS.values():
        data = encoded(**kind)
        fast = [jpeg.decode(data, header_of(data), bottom=75, shrink=shrink, name="test") for shrink in jpeg.SHRINKS]
        with monkeypatch.context() as absent:
            absent.setattr(jpeg, "simplejpeg", None)
            for shrink, pixels in zip(jpeg.SHRINKS, fast, strict=True):
                slow = jpeg.decode(data, header_of(data), bottom=75, shrink=shrink, name="test")
                np.testing.assert_array_equal(pixels, slow, strict=True)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", ["exif", "xmp"])
def test_rotated_photos_are_turned_whatever_reads_them(orientation: int, place: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    xmp = f'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'.encode()
    if place == "exif":
        exif[0x0112] = orientation
    data = encoded(exif=exif, **({"xmp": xmp} if place == "xmp" else {}))
    image = open_picture(data, name="test")
    with Image.open(io.BytesIO(data)) as stored:
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # Pillow's Transpose, by the EXIF standard
        upright = np.asarray(stored if turn is None else stored.transpose(Image.Transpose(turn)))
    assert (image.height, image.width) == upright.shape[:2]
    np.testing.assert_array_equal(image.decode(), upright)
    assert isinstance(image, Jpeg) == (orientation == 1 and place == "exif")


@pytest.mark.parametrize("order", ["II", "MM"])
def test_an_orientation_in_either_byte_order_is_seen(order: str) -> None:
    prefix = {"II": "<", "MM": ">"}[order]
    tiff = order.encode() + np.array([42], f"{prefix}u2").tobytes() + np.array([8], f"{prefix}u4").tobytes()
    entry = np.array([0x0112, 3], f"{prefix}u2").tobytes() + np.array([1], f"{prefix}u4").tobytes()
    value = np.array([6, 0], f"{prefix}u2").tobytes()
    tiff += np.array([1], f"{prefix}u2").tobytes() + entry + value + bytes(4)
    image = open_picture(encoded((20, 30), exif=b"Exif\0\0" + tiff), name="test")
    assert (image.height, image.width) == (30, 20)


def test_kinds_that_are_not_plain_are_left_to_pillow() -> None:
    plain = encoded()
    for data in (encoded(mode="CMYK"), plain[:-2], plain + b"appended", b"\xff\xd8\xff\xd9", b"text", b""):
        assert jpeg.read_header(data, name="test") is None


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_colour_in_any_mixture(mode: str, channels: int) -> None:
    data = encoded(mode=mode)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    pixels = open_picture(data, channels=channels, name="test").decode()
    np.testing.assert_array_equal(np.broadcast_to(pixels, (75, 100, channels)), expected.reshape(75, 100, channels))


def test_a_header_that_announces_a_huge_picture_is_refused_at_once() -> None:
    data = encoded()
    at = header_of(data).height_at
    assert at is not None
    bomb = data[:at] + (60000).to_bytes(2, "big") * 2 + data[at + 4 :]
    before = time.perf_counter()
    with pytest.raises(DataError, match=r"camera\.jpg.* 60000x60000 pixels"):
        open_picture(bomb, name="camera.jpg")
    assert time.perf_counter() - before < 0.5


@given(damage=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_pixels_or_an_error_that_says_which(damage: list[tuple[int, int]]) -> None:
    data = bytearray(encoded((40, 48)))
    for place, value in damage:
        data[place % len(data)] = value
    try:
        image = open_picture(bytes(data), name="damaged.jpg")
        outcome = str(image.decode(bottom=image.height).dtype)
    except DataError as error:
        outcome = str(error)
    assert outcome == "uint8" or "damaged.jpg" in outcome
