"""Random resized crop and flip with parameters drawn from a counter; resizing for evaluation; normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mae_transfer.data.decode import Picture
from mae_transfer.data.draws import Draws
from mae_transfer.errors import DataError

_ATTEMPTS = 10
_RESERVE = 2  # a decoder may shrink to this many times the size that is wanted; bicubic resizing does the rest


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
    flip: float = 0.5,
) -> Crop:
    """Parameters of RandomResizedCrop and of a horizontal flip, distributed as torchvision's.

    Area uniform in ``scale`` of the image's, aspect ratio log-uniform in ``ratio``, ten attempts until the box fits,
    then the largest centred box of an allowed aspect ratio. Every image uses the same number of draws.

    Args:
        image_size: (height, width) of the original image.
        flip: its probability.
    """
    height, width = image_size
    values = draws.uniform(4 * _ATTEMPTS + 1)
    mirrored = bool(values[-1] < flip)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio, u_top, u_left in values[:-1].reshape(_ATTEMPTS, 4).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            return Crop(left=left, top=top, width=w, height=h, flip=mirrored)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return Crop(left=(width - w) // 2, top=(height - h) // 2, width=w, height=h, flip=mirrored)


def cut(picture: Picture, crops: Sequence[Crop], *, size: tuple[int, int]) -> list[Tensor]:
    """Decode once, no more than ``crops`` need, and make each of them: (H, W, C) each, ``size`` being (H, W).

    C is 1 for a gray picture, whatever number of channels was asked for: it is to be repeated.

    Raises:
        DataError: the picture is damaged.
    """
    shrink = _shrink(picture, crops, size)
    pixels = picture.decode(bottom=max(crop.top + crop.height for crop in crops), shrink=shrink)
    if shrink > 1:
        return [_resize_shrunk(pixels, crop, shrink, size) for crop in crops]
    return [_crop_and_resize(pixels, crop, size) for crop in crops]


def _shrink(picture: Picture, crops: Sequence[Crop], size: tuple[int, int]) -> int:
    """By how much the decoder may shrink: what is left of each crop is still twice ``size`` or more."""
    room = min(min(crop.height / size[0], crop.width / size[1]) for crop in crops) / _RESERVE
    return next(shrink for shrink in picture.shrinks if shrink <= max(room, 1))


def apply_crop(image: Image.Image | np.ndarray, crop: Crop, *, size: tuple[int, int]) -> np.ndarray:
    """Cut, resize (bicubic, antialiased) and mirror: (H, W, C) of the type of ``image``, ``size`` being (H, W).

    The box is cut first, so that pixels outside it do not bleed into the edge.

    8-bit pixels differ from those that Pillow gives going across first and then down by 2 at most and 0.02 on average
    (torch computes with 16-bit weights). That is the way of Pillow up to 12; Pillow 13 goes down first where that is
    less work, and as pixels are rounded and clipped in between, that shows: by up to 16, 0.3 on average, in photos.

    Args:
        image: a Pillow image, or (H, W, C) uint8, uint16 or float32.

    Raises:
        DataError: float values that are not finite.
    """
    pixels = np.asarray(image)
    return _crop_and_resize(pixels if pixels.ndim == 3 else pixels[:, :, None], crop, size).numpy()


def _crop_and_resize(pixels: np.ndarray, crop: Crop, size: tuple[int, int]) -> Tensor:
    """(H, W, C)."""
    # A copy, as the resizing has its fast path for pixels without gaps between rows.
    box = np.array(pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width])
    # Strides as those of a batch of one with channels last: with others torch unpacks the colours and packs them again.
    images = torch.from_numpy(box).unsqueeze(0).permute(0, 3, 1, 2)
    resized = _resize(images, size)
    return (resized.flip(3) if crop.flip else resized)[0].permute(1, 2, 0)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, C, h, w) to (1, C, H, W) of the same type."""
    if images.dtype == torch.uint8:
        if images.shape[1] > 4:  # the fast path takes up to four
            parts = [
                _resize(part.contiguous(memory_format=torch.channels_last), size) for part in images.split(3, dim=1)
            ]
            return torch.cat(parts, dim=1)
        return _bicubic(images, size)
    resized = _bicubic(images.float(), size)
    if images.dtype == torch.uint16:
        return resized.round_().clamp_(0, 65535).to(torch.uint16)
    if not bool(resized.isfinite().all()):
        raise DataError("an image has values that are not finite (NaN or infinite)")
    return resized


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def _resize_shrunk(pixels: np.ndarray, crop: Crop, shrink: int, size: tuple[int, int]) -> Tensor:
    """A crop given in pixels of the whole image, of pixels at 1/``shrink`` of it: its edges lie between pixels."""
    left, top = crop.left / shrink, crop.top / shrink
    right, bottom = (crop.left + crop.width) / shrink, (crop.top + crop.height) / shrink
    x, y = math.floor(left), math.floor(top)
    cut = np.ascontiguousarray(pixels[y : math.ceil(bottom), x : math.ceil(right)])
    box = (left - x, top - y, min(right - x, cut.shape[1]), min(bottom - y, cut.shape[0]))
    image = Image.fromarray(cut if cut.shape[2] == 3 else cut[:, :, 0])
    resized = np.array(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)).reshape(*size, -1)
    result = torch.from_numpy(resized)
    return result.flip(1) if crop.flip else result


def centre_box(image: Image.Image | Picture, *, size: tuple[int, int]) -> Crop:
    """The largest centred box of the aspect ratio of ``size`` (H, W)."""
    factor = min(image.width / size[1], image.height / size[0])
    w, h = max(1, round(size[1] * factor)), max(1, round(size[0] * factor))
    return Crop(left=(image.width - w) // 2, top=(image.height - h) // 2, width=w, height=h, flip=False)


def centre_crop(image: Image.Image, *, size: tuple[int, int]) -> np.ndarray:
    """``centre_box`` resized to ``size``: (H, W, C) uint8.

    What evaluation and pictures use: nothing is distorted and as much as possible is seen.
    """
    return apply_crop(image, centre_box(image, size=size), size=size)


def whole_range(dtype: torch.dtype) -> float:
    """What stands for 1 in pixels of a type: 255, 65535, or 1 for float values, which are taken as they are."""
    return {torch.uint8: 255.0, torch.uint16: 65535.0}.get(dtype, 1.0)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) uint8, uint16 or float to float32 with the mean and standard deviation taken out.

    Both are of values in 0..1 where pixels are integers, and of the values as they are where they are float.
    """
    scale = whole_range(images.dtype)
    offset = torch.tensor(mean, device=images.device) * scale
    factor = 1 / (torch.tensor(std, device=images.device) * scale)
    values = images.permute(0, 2, 3, 1)  # (N, H, W, C)
    if not values.is_contiguous():
        return (images.float() - offset.view(-1, 1, 1)) * factor.view(-1, 1, 1)
    # As batches come: rows of W * C numbers, which are three times as fast as W times C of them.
    _, _, width, channels = values.shape
    rows = values.flatten(2).to(torch.float32, copy=True)
    rows.sub_(offset.repeat(width)).mul_(factor.repeat(width))
    return rows.unflatten(2, (width, channels)).permute(0, 3, 1, 2)


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) normalised to values in 0..1, clipped."""
    offset = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    factor = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return (images.float() * factor + offset).clamp(0, 1)
