"""What happens to an image and its instances before the network: resizing, cropping, flipping.

Every random number is drawn from a counter keyed by (seed, epoch, sample), so a sample is the same whatever the
number of processes and however often the run was restarted.
"""

from __future__ import annotations

from dataclasses import dataclass

import detectron2.data.transforms as T
import numpy as np
from PIL import Image

from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.errors import ConfigError

RESIZES = ("jitter", "native")
FLIPS = ("horizontal", "vertical")
_CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How images come to the network's size.

    Attributes:
        image_size: side of the square that training crops fit in, in pixels.
        resize: "jitter" = large-scale jitter as ViTDet and Li et al. have it, to the same numbers as Detectron2's
            RandomFlip, ResizeScale and FixedSizeCrop(pad=False): the image is flipped, resized to fit ``scale`` x the
            square, and cropped to the square where it is larger, with or without instances in it. In evaluation its
            longer side becomes ``image_size``. "native" = pixels are never resampled: training takes a crop of the
            square's size that holds an instance, evaluation the whole image.
        scale: smallest and largest factor of the jitter (ViTDet and Li et al.: 0.1 to 2).
        flips: each is applied to half of the samples.
    """

    image_size: int
    resize: str = "jitter"
    scale: tuple[float, float] = (0.1, 2.0)
    flips: tuple[str, ...] = ("horizontal",)

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ConfigError(f"dataset.resize={self.resize}: expected one of {', '.join(RESIZES)}")
        if unknown := [flip for flip in self.flips if flip not in FLIPS]:
            raise ConfigError(f"dataset.flips has {unknown[0]!r}; expected a list of {', '.join(FLIPS)}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"dataset.scale={list(self.scale)}: expected [smallest, largest], both above 0")
        if self.image_size < 1:
            raise ConfigError(f"dataset.image_size={self.image_size}: expected a positive number of pixels")

    def training(
        self, height: int, width: int, boxes: np.ndarray, *, seed: int, epoch: int, index: int
    ) -> T.TransformList:
        """The transforms of one training sample.

        Args:
            boxes: (M, 4) of x0, y0, x1, y1: the instances of which a native crop must keep at least one centre.
        """
        draws = Draws(seed=seed, purpose=Purpose.CROP, epoch=epoch, index=index)
        if self.resize == "jitter":
            return T.TransformList(self._jitter(height, width, draws))
        return T.TransformList(self._native(height, width, boxes, draws))

    @property
    def smallest_visible(self) -> float:
        """Pixels of an instance's box that must be seen in both directions, after resizing.

        The published recipe keeps whatever is seen at all. Of an image that is not resampled, less than a pixel is a
        sliver at the edge of the crop.
        """
        return 1.0 if self.resize == "native" else 0.0

    def _jitter(self, height: int, width: int, draws: Draws) -> list[T.Transform]:
        transforms = self._flips(height, width, draws)
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * draws.uniform(1)[0]
        resized = fit_inside(height, width, self.image_size * factor)
        transforms.append(_Resize(height, width, *resized, Image.Resampling.BILINEAR))
        height, width = resized
        crop_height, crop_width = min(height, self.image_size), min(width, self.image_size)
        if (crop_height, crop_width) != (height, width):
            place = draws.uniform(1)[0]  # one for both directions: crops lie on the diagonal, as published
            y, x = round((height - crop_height) * place), round((width - crop_width) * place)
            transforms.append(T.CropTransform(x, y, crop_width, crop_height, width, height))
        return transforms

    def _native(self, height: int, width: int, boxes: np.ndarray, draws: Draws) -> list[T.Transform]:
        transforms: list[T.Transform] = []
        crop_height, crop_width = min(height, self.image_size), min(width, self.image_size)
        if (crop_height, crop_width) != (height, width):
            x, y = crop_place(height, width, crop_height, crop_width, boxes, draws)
            transforms.append(T.CropTransform(x, y, crop_width, crop_height, width, height))
        return transforms + self._flips(crop_height, crop_width, draws)

    def _flips(self, height: int, width: int, draws: Draws) -> list[T.Transform]:
        flip = draws.uniform(2) < 0.5
        transforms: list[T.Transform] = []
        if flip[0] and "horizontal" in self.flips:
            transforms.append(T.HFlipTransform(width))
        if flip[1] and "vertical" in self.flips:
            transforms.append(T.VFlipTransform(height))
        return transforms

    def evaluation(self, height: int, width: int) -> T.TransformList:
        """The transforms of an image that is predicted on."""
        if self.resize == "native":
            return T.TransformList([])
        resized = T.ResizeShortestEdge.get_output_shape(height, width, self.image_size, self.image_size)
        new_height, new_width = max(1, resized[0]), max(1, resized[1])  # a strip of an image still has a pixel
        return T.TransformList([_Resize(height, width, new_height, new_width, Image.Resampling.BILINEAR)])


class _Resize(T.ResizeTransform):
    """Detectron2's returns Pillow's read-only arrays, of which torch warns further on."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        return np.array(super().apply_image(img, interp))


def fit_inside(height: int, width: int, side: float) -> tuple[int, int]:
    """Height and width with the same ratio whose longer side is ``side``, each at least one pixel."""
    factor = side / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def crop_place(
    height: int, width: int, crop_height: int, crop_width: int, boxes: np.ndarray, draws: Draws
) -> tuple[int, int]:
    """Left and upper edge of a random crop that holds the centre of at least one box, where there is one.

    Places are tried uniformly, so that where instances are common every place is as likely as in an unconditional
    crop; an image with one small instance falls back on the places that hold it.
    """
    free_x, free_y = width - crop_width, height - crop_height
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 if len(boxes) else np.zeros((0, 2))
    for _ in range(_CROP_TRIES):
        u, v = draws.uniform(2)
        x, y = int(u * (free_x + 1)), int(v * (free_y + 1))
        inside = (
            (centres[:, 0] >= x)
            & (centres[:, 0] < x + crop_width)
            & (centres[:, 1] >= y)
            & (centres[:, 1] < y + crop_height)
        )
        if not len(centres) or inside.any():
            return x, y
    u, v, which = draws.uniform(3)
    centre_x, centre_y = centres[int(which * len(centres))]
    # The crops that hold the centre start between it and one crop size before it.
    x = int(np.clip(centre_x - u * crop_width, 0, free_x))
    y = int(np.clip(centre_y - v * crop_height, 0, free_y))
    return x, y
