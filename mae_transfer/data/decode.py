"""Any image file to pixels of the wanted number of channels.

One or three channels are a picture: whatever file Pillow opens, in 8 bits, gray or RGB, the right way up. Any other
number is measured data (multispectral, microscopy …): TIFF and NumPy files, and image files that hold exactly that many
channels, taken as they are. Values keep their type, and the type says their range: uint8 is 0..255 and uint16 0..65535,
both standing for 0..1; float is taken as it is. Mean and standard deviation are in these units
(``mae_transfer.data.transforms.normalise``).
"""

from __future__ import annotations

import io
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mae_transfer.data import jpeg
from mae_transfer.data.limits import UNREADABLE, check_pixels, reason
from mae_transfer.errors import ConfigError, DataError, MissingDependencyError, require

MODES = {1: "L", 3: "RGB"}
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_NUMPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def check_channels(channels: int) -> None:
    """Raises ConfigError where there is no such picture."""
    if channels < 1:
        raise ConfigError(f"data.channels={channels} must be at least 1")


def is_picture(channels: int) -> bool:
    """Whether ``channels`` make a gray or coloured picture rather than measured data."""
    return channels in MODES


class Picture(ABC):
    """An image whose size is known, and whose pixels are decoded when they are asked for.

    Attributes:
        height, width: upright, in pixels.
        shrinks: what ``decode`` can divide both sides by while decoding, largest first, ending with 1.
    """

    height: int
    width: int
    shrinks: tuple[int, ...] = (1,)

    @abstractmethod
    def decode(self, *, bottom: int | None = None, shrink: int = 1) -> np.ndarray:
        """Pixels from the top to row ``bottom`` (all of them if None) or further, at 1/``shrink`` of the size.

        Returns:
            (h, w, C), or (h, w, 1) for a gray picture of which three channels were asked. Not to be written to.

        Raises:
            DataError: damaged.
        """


class Pixels(Picture):
    """Pixels that are there already."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def decode(self, *, bottom: int | None = None, shrink: int = 1) -> np.ndarray:
        return self._pixels


class Jpeg(Picture):
    """A plain JPEG (see ``mae_transfer.data.jpeg``)."""

    shrinks = jpeg.SHRINKS

    def __init__(self, data: bytes, header: jpeg.JpegHeader, *, channels: int, name: str) -> None:
        self.height, self.width = header.height, header.width
        self._data = data
        self._header = header
        self._to_gray = channels == 1 and header.components == 3
        self._name = name

    def decode(self, *, bottom: int | None = None, shrink: int = 1) -> np.ndarray:
        rows = self.height if bottom is None else bottom
        pixels = jpeg.decode(self._data, self._header, bottom=rows, shrink=shrink, name=self._name)
        if self._to_gray:
            return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        return pixels


def open_picture(data: bytes, *, channels: int = 3, name: str, floats: bool = True) -> Picture:
    """The image in the bytes of a file, by what the bytes are, whatever the file is called.

    Args:
        channels: how many the pixels shall have.
        name: what error messages call it.
        floats: whether float values may be taken as they are. Without a mean and deviation of their own there is no
            telling what they are.

    Raises:
        DataError: not an image, damaged, cut off, too large, or of another number of channels.
        MissingDependencyError: a TIFF file that needs tifffile.
    """
    if is_picture(channels):
        header = jpeg.read_header(data, name=name)
        if header is not None:
            return Jpeg(data, header, channels=channels, name=name)
    start = data[:6]
    if start == _NUMPY:
        return Pixels(_as_image(_read_npy(io.BytesIO(data), name), channels, name, floats=floats))
    if start[:4] == _ZIP:
        return Pixels(_as_image(_read_npz(data, name), channels, name, floats=floats))
    if not is_picture(channels):
        pixels = _read_tiff(data, name) if start[:4] in _TIFF else _read_as_stored(data, channels, name)
        return Pixels(_as_image(pixels, channels, name, floats=floats))
    try:
        image = _decode(io.BytesIO(data), name=name, channels=channels)
    except DataError:
        if start[:4] not in _TIFF:
            raise
        image = _picture_from_tiff(data, channels, name)
    pixels = np.asarray(image)
    return Pixels(pixels if pixels.ndim == 3 else pixels[:, :, None])


def open_array(path: Path, *, channels: int, floats: bool = True) -> Picture:
    """A ``.npy`` file, mapped: only the part that is cropped is read.

    Raises:
        DataError: as ``open_picture``.
    """
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise DataError(f"cannot read image {path}: {reason(error)}") from error
    return Pixels(_as_image(pixels, channels, str(path), floats=floats))


def decode_image(path: str | Path, *, channels: int = 3) -> Image.Image:
    """Read an image file as RGB or grayscale, 8 bits a channel, the right way up.

    Grayscale, palette, RGBA (alpha is dropped), CMYK and 16-bit files are converted; EXIF rotation is applied.
    16-bit values keep their upper 8 bits (Pillow's own conversion would clip everything above 255 to white).

    Raises:
        DataError: missing, truncated, not an image, too large, or of a kind that has no 8-bit meaning (float pixels).
    """
    return _decode(path, name=str(path), channels=channels)


def _decode(file: Any, *, name: str, channels: int) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise DataError(f"cannot read image {name}: {reason(error)}") from error
    return to_eight_bits(upright, path=name).convert(MODES[channels])


def to_eight_bits(image: Image.Image, *, path: str | Path) -> Image.Image:
    """A 16-bit grayscale image by its upper 8 bits; 8-bit images as they are.

    Raises:
        DataError: float pixels, or integers beyond 16 bits: their range is not known.
    """
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(f"image {path} has values outside 0..65535; convert it to 8 or 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise DataError(f"image {path} has float pixels, whose range is not known; convert it to 8 or 16 bits")
    return image


def _read_npy(file: Any, name: str) -> np.ndarray:
    """An array from an open file, refused by its header where it would not fit into memory."""
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
        check_pixels(1, int(np.prod([max(int(side), 1) for side in shape], dtype=object)) // 4, name=name)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read image {name}: {reason(error)}") from error


def _read_npz(data: bytes, name: str) -> np.ndarray:
    """The only array of an archive, or the one called ``image``."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [member for member in archive.namelist() if member.endswith(".npy")]
            wanted = "image.npy" if "image.npy" in members else members[0] if len(members) == 1 else None
            if wanted is None:
                raise ValueError(f"an archive of {len(members)} arrays; expected one, or one called 'image'")
            return _read_npy(io.BytesIO(_unpack(archive, wanted, name)), name)
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"cannot read image {name}: {reason(error)}") from error


def _unpack(archive: zipfile.ZipFile, member: str, name: str) -> bytes:
    size = archive.getinfo(member).file_size
    check_pixels(1, size // 8, name=name)
    return archive.read(member)


def _read_tiff(data: bytes, name: str) -> np.ndarray:
    """The first series of a TIFF file: a page of many channels, or a page for each channel."""
    tifffile = require("tifffile", "tiff")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            check_pixels(1, int(np.prod(series.shape, dtype=object)) // 4, name=name)
            return np.asarray(series.asarray())
    except DataError:
        raise
    except UNREADABLE as error:
        advice = "; pip install imagecodecs" if "imagecodecs" in str(error) else ""
        raise DataError(f"cannot read image {name}: {reason(error)}{advice}") from error


def _picture_from_tiff(data: bytes, channels: int, name: str) -> Image.Image:
    """Gray or RGB from a TIFF file that Pillow does not know, such as 16 bits a colour, by the upper 8 bits."""
    try:
        pixels = _read_tiff(data, name)
    except MissingDependencyError as error:
        raise DataError(f"cannot read image {name}: Pillow does not know this kind, and {error}") from error
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    for wanted in (3, 1):
        if pixels.dtype == np.uint8 and _axis_of_channels(pixels, wanted) is not None:
            pixels = _as_image(pixels, wanted, name, floats=False)
            return Image.fromarray(pixels if wanted == 3 else pixels[:, :, 0]).convert(MODES[channels])
    raise DataError(f"cannot read image {name}: {pixels.dtype} values of shape {pixels.shape} are no picture")


def _read_as_stored(data: bytes, channels: int, name: str) -> np.ndarray:
    """RGBA, gray with alpha, CMYK … as the file has it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise DataError(f"cannot read image {name}: {reason(error)}") from error
    if len(upright.getbands()) != channels:
        raise DataError(
            f"image {name} has {len(upright.getbands())} channels ({upright.mode}); data.channels={channels} needs "
            "files with as many: TIFF or NumPy, usually"
        )
    return np.asarray(upright)


def _axis_of_channels(pixels: np.ndarray, channels: int) -> int | None:
    """Where the channels are: last, else first; -1 for a plain (H, W) of one channel."""
    if pixels.ndim == 3:
        return 2 if pixels.shape[2] == channels else 0 if pixels.shape[0] == channels else None
    return -1 if pixels.ndim == 2 and channels == 1 else None


def _as_image(pixels: np.ndarray, channels: int, name: str, *, floats: bool) -> np.ndarray:
    """(H, W, C) in the processor's byte order; uint8, uint16 or float32.

    Raises:
        DataError: another shape, or another type, whose range is not known.
    """
    axis = _axis_of_channels(pixels, channels)
    if axis is None or not pixels.size:
        raise DataError(
            f"array {name} has the shape {pixels.shape}; data.channels={channels} needs (H, W, {channels}) or "
            f"({channels}, H, W)"
        )
    pixels = pixels[:, :, None] if axis == -1 else np.moveaxis(pixels, 0, 2) if axis == 0 else pixels
    check_pixels(*pixels.shape[:2], name=name)
    kind = pixels.dtype
    if kind.kind == "f":
        if not floats:
            raise DataError(
                f"array {name} holds {kind} values, which are taken as they are: say what to subtract and divide by, "
                "data.mean=[…] data.std=[…]"
            )
        return pixels if kind == np.float32 else pixels.astype(np.float32)
    if kind.kind != "u" or kind.itemsize > 2:
        raise DataError(
            f"array {name} holds {kind} values, whose range is not known; convert to uint8, uint16 or float32"
        )
    return pixels.astype(kind.newbyteorder("="), copy=False)
