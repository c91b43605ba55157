"""Any image file to uint8 pixels of the wanted number of channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mae_transfer.errors import ConfigError, DataError

MODES = {1: "L", 3: "RGB"}
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


def check_channels(channels: int) -> None:
    """Raises ConfigError where image files cannot give ``channels``."""
    if channels not in MODES:
        raise ConfigError(f"data.channels={channels}: image files give 1 (grayscale) or 3 (RGB) channels")


def decode_image(path: str | Path, *, channels: int = 3) -> Image.Image:
    """Read an image file as RGB or grayscale, 8 bits a channel, the right way up.

    Grayscale, palette, RGBA (alpha is dropped), CMYK and 16-bit files are converted; EXIF rotation is applied.
    16-bit values keep their upper 8 bits (Pillow's own conversion would clip everything above 255 to white).

    Raises:
        DataError: missing, truncated, not an image, or of a kind that has no 8-bit meaning (float pixels).
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {error}") from error
    return to_eight_bits(upright, path=path).convert(MODES[channels])


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
