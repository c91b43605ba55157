"""What a classifier sees of an image when it is tested: the short side resized, and the centre of that."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mae_transfer.data.decode import Picture
from mae_transfer.errors import DataError


def evaluation_view(picture: Picture, *, size: tuple[int, int], crop: float) -> Tensor:
    """The centre of the resized image: (H, W, C) of the picture's type, ``size`` being (H, W).

    The image is resized, keeping its shape, until it covers ``size`` / ``crop``: for a square that is its short side to
    ``int(side / crop)`` pixels, torchvision's ``Resize`` and ``CenterCrop`` to the last bit for 8-bit pictures, which
    Pillow resizes (bicubic). The whole image is resized before it is cut, so that the cut's edges have seen their
    neighbours; decoders are not asked to shrink, which would be faster and slightly different.

    C is 1 for a gray picture, whatever number of channels was asked for: it is to be repeated.

    Raises:
        DataError: the picture is damaged, or has values that are not finite.
    """
    pixels = picture.decode()
    height, width = covering_size(pixels.shape[:2], size=size, crop=crop)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        cut = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size[1], top + size[0]))
        return torch.from_numpy(np.array(cut).reshape(*size, -1))
    values = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]  # (1, C, H, W)
    resized = _resize_values(values, (height, width))[0].permute(1, 2, 0)
    return resized[top : top + size[0], left : left + size[1]]


def covering_size(image_size: tuple[int, ...], *, size: tuple[int, int], crop: float) -> tuple[int, int]:
    """(h, w) to which an image of (H, W) is resized before its centre of ``size`` (H, W) is cut."""
    (height, width), (target_h, target_w) = image_size, (int(side / crop) for side in size)
    if target_h * width <= target_w * height:  # the width decides; what is over is above and below
        return max(int(target_w * height / width), target_h), target_w
    return target_h, max(int(target_h * width / height), target_w)


def _resize_values(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels of other kinds: bicubic with antialiasing in floating point, back to their type."""
    resized = F.interpolate(values.float(), size, mode="bicubic", antialias=True)
    if values.dtype == torch.float32:
        if not bool(resized.isfinite().all()):
            raise DataError("an image has values that are not finite (NaN or infinite)")
        return resized
    top = 255 if values.dtype == torch.uint8 else 65535
    return resized.round_().clamp_(0, top).to(values.dtype)
