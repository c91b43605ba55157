"""What a reader of image files must expect of them: any error at all, and sizes that no memory holds."""

from __future__ import annotations

import struct
import zipfile
import zlib

from PIL import Image, UnidentifiedImageError

from mae_transfer.errors import DataError

# What Pillow, numpy and tifffile raise for damaged files. Each has been seen.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(MemoryError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError),
)


def reason(error: BaseException) -> str:
    """What went wrong, for a message that names the file itself."""
    if isinstance(error, UnidentifiedImageError):  # it would name a buffer in memory
        return "no kind of image that Pillow knows"
    return str(error) or type(error).__name__


def check_pixels(height: int, width: int, *, name: str) -> None:
    """Refuse a picture by its header, before memory is asked for, at Pillow's own limit.

    Raises:
        DataError: more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million in all), which a user may raise.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise DataError(
            f"cannot read image {name}: it announces {width}x{height} pixels, more than {2 * limit} in all "
            "(twice PIL.Image.MAX_IMAGE_PIXELS)"
        )
