"""Random resized crop and flip with parameters drawn from a counter; resizing for evaluation; normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_transfer.data.draws import Draws

_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A box in pixels of the original image, and whether to mirror it."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


def draw_crop(
    draws: Draws,
    *,
    image_size: tuple[int, int],
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """Parameters of RandomResizedCrop and of a fair horizontal flip, distributed as torchvision's.

    Area uniform in ``scale`` of the image's, aspect ratio log-uniform in ``ratio``, ten attempts until the box fits,
    then the largest centred box of an allowed aspect ratio. Every image uses the same number of draws.

    Args:
        image_size: (height, width) of the original image.
    """
    height, width = image_size
    values = draws.uniform(4 * _ATTEMPTS + 1)
    flip = bool(values[-1] < 0.5)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio, u_top, u_left in values[:-1].reshape(_ATTEMPTS, 4).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            return Crop(left=left, top=top, width=w, height=h, flip=flip)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return Crop(left=(width - w) // 2, top=(height - h) // 2, width=w, height=h, flip=flip)


def apply_crop(image: Image.Image, crop: Crop, *, size: tuple[int, int]) -> np.ndarray:
    """Cut, resize (bicubic, antialiased) and mirror: (H, W, C) uint8, ``size`` being (H, W).

    The box is cut first, so that pixels outside it do not bleed into the edge.
    """
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    pixels = np.asarray(image.crop(box).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return pixels[:, ::-1] if crop.flip else pixels


def centre_box(image: Image.Image, *, size: tuple[int, int]) -> Crop:
    """The largest centred box of the aspect ratio of ``size`` (H, W)."""
    factor = min(image.width / size[1], image.height / size[0])
    w, h = max(1, round(size[1] * factor)), max(1, round(size[0] * factor))
    return Crop(left=(image.width - w) // 2, top=(image.height - h) // 2, width=w, height=h, flip=False)


def centre_crop(image: Image.Image, *, size: tuple[int, int]) -> np.ndarray:
    """``centre_box`` resized to ``size``: (H, W, C) uint8.

    What evaluation and pictures use: nothing is distorted and as much as possible is seen.
    """
    return apply_crop(image, centre_box(image, size=size), size=size)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) uint8 to float32 with the mean and standard deviation (of values in 0..1) taken out."""
    offset = torch.tensor(mean, device=images.device).view(-1, 1, 1) * 255
    factor = 1 / (torch.tensor(std, device=images.device).view(-1, 1, 1) * 255)
    return (images.float() - offset) * factor


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) normalised to values in 0..1, clipped."""
    offset = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    factor = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return (images.float() * factor + offset).clamp(0, 1)
