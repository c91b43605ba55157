"""The plain kind of JPEG, decoded fast: no row below the ones wanted, and large ones at a half, quarter or eighth.

The plain kind is what nearly every data set consists of: Huffman-coded, 8 bits, gray or three colours, upright, whole.
Whatever else a JPEG may be (CMYK, lossless, rotated by its EXIF entry, cut off …) is not recognised here, on purpose:
Pillow judges it. Both decode with libjpeg-turbo and the same settings, so that the pixels are the same bit for bit
where the two bring the same version of its arithmetic, and simplejpeg may be absent without changing a run.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mae_transfer.data.limits import UNREADABLE, check_pixels, reason
from mae_transfer.errors import DataError

try:
    import simplejpeg
except ImportError:  # pragma: no cover - a machine for which there is no wheel
    simplejpeg = None

SHRINKS = (8, 4, 2, 1)  # what the inverse cosine transform can divide both sides by at a profit

_BASELINE = (0xC0, 0xC1)  # baseline and extended sequential
_PROGRESSIVE = 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # every start-of-frame marker
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_START_OF_SCAN, _EXIF_OR_XMP = 0xDA, 0xE1
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """What has to be known before decoding.

    Attributes:
        components: 1 (gray) or 3.
        block: rows of a row of blocks (MCU), 8 times the largest vertical sampling factor.
        height_at: where the file says its height, two bytes; None where a lower height would not save anything.
    """

    height: int
    width: int
    components: int
    block: int
    height_at: int | None


def read_header(data: bytes, *, name: str) -> JpegHeader | None:
    """The header of a plain JPEG; None for everything else, which Pillow has to look at.

    Raises:
        DataError: it announces more pixels than anybody's photo has.
    """
    # A file that was cut off does not end with the end-of-image marker, and no other look notices that for sure.
    if data[:2] != b"\xff\xd8" or not data.endswith(b"\xff\xd9"):
        return None
    try:
        return _walk(data, name)
    except (IndexError, struct.error):
        return None


def _walk(data: bytes, name: str) -> JpegHeader | None:
    at, seen_exif = 2, False
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _BARE:
            at += 2
            continue
        if marker == _START_OF_SCAN:
            return None  # no frame came before it
        length = (data[at + 2] << 8) | data[at + 3]
        if marker in _FRAMES:
            return _frame(data, at, marker, name)
        if marker == _EXIF_OR_XMP:
            segment = data[at + 4 : at + 2 + length]
            if seen_exif or _may_be_rotated(segment):
                return None
            seen_exif = segment.startswith(b"Exif\0\0")
        at += 2 + length
    return None


def _frame(data: bytes, at: int, marker: int, name: str) -> JpegHeader | None:
    precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
    plain = marker in _BASELINE or marker == _PROGRESSIVE
    if not plain or precision != 8 or components not in (1, 3) or not height or not width:
        return None
    check_pixels(height, width, name=name)
    vertical = max(data[at + 11 + 3 * i] & 15 for i in range(components))
    return JpegHeader(
        height=height,
        width=width,
        components=components,
        block=8 * vertical,
        # A progressive file spreads every row over all of it.
        height_at=at + 5 if marker in _BASELINE else None,
    )


def _may_be_rotated(segment: bytes) -> bool:
    """Whether an APP1 segment says, or could be taken to say, that the picture is not upright."""
    if not segment.startswith(b"Exif\0\0"):
        return b"rientation" in segment  # XMP
    tiff = segment[6:]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return True
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == _ORIENTATION:
            return value != 1
    return False


def decode(data: bytes, header: JpegHeader, *, bottom: int, shrink: int = 1, name: str) -> np.ndarray:
    """Decode the upper ``bottom`` rows at 1/``shrink`` of the size.

    Args:
        bottom: in rows of the whole image. What lies below is not decoded where that can be avoided.
        shrink: one of ``SHRINKS``. Each side becomes ceil(side / shrink) long.

    Returns:
        (h, w, 1 or 3) uint8 with at least ceil(bottom / shrink) rows.

    Raises:
        DataError: damaged.
    """
    if simplejpeg is None:  # pragma: no cover - as above
        return decode_with_pillow(data, header, shrink=shrink, name=name)
    whole, height, width = data, header.height, header.width
    # One row of blocks more: upsampling of the colours looks at the row below.
    rows = (-(-bottom // header.block) + 1) * header.block
    if header.height_at is not None and rows < height:
        # The decoder stops where the picture ends: so the picture is said to end there.
        data = data[: header.height_at] + rows.to_bytes(2, "big") + data[header.height_at + 2 :]
        height = rows
    try:
        return simplejpeg.decode_jpeg(
            data,
            colorspace="RGB" if header.components == 3 else "GRAY",
            min_height=-(-height // shrink) if shrink > 1 else 0,
            min_width=-(-width // shrink) if shrink > 1 else 0,
            min_factor=shrink,
            # As with Pillow, what the decoder can recover from is not an error: "extraneous bytes" is even expected.
            strict=False,
        )
    except ValueError:
        return decode_with_pillow(whole, header, shrink=shrink, name=name)


def decode_with_pillow(data: bytes, header: JpegHeader, *, shrink: int, name: str) -> np.ndarray:
    """The same, of the whole picture, by Pillow."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if shrink > 1:
                # Pillow takes the largest reduction by 2, 4 or 8 that leaves at least this size.
                image.draft(None, (header.width // shrink, header.height // shrink))
            pixels = np.asarray(image.convert("RGB" if header.components == 3 else "L"))
    except UNREADABLE as error:
        raise DataError(f"cannot read image {name}: {reason(error)}") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
