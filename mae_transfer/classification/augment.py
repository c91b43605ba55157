"""Augmentation of classification: timm's colours and geometry, random erasing, mixup and cutmix, drawn from counters.

timm draws from the global generators of Python, numpy and torch. Each sample's part seeds them from its own stream and
puts them back as they were, so that what happens to an image is a function of (seed, epoch, index, view), whichever
process or worker prepares it. Mixup and cutmix (batch mode, as the published fine-tuning code) have one draw for each
micro-batch, named by its first sample: they are the one thing that depends on how a batch is divided.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mae_transfer.data.draws import Draws
from mae_transfer.data.transforms import normalise
from mae_transfer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mae_transfer.classification.images import LabelledBatch
    from mae_transfer.classification.sections import AugmentConfig

_ERASE_AREA, _ERASE_ASPECT, _ERASE_ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10  # timm's defaults


@contextmanager
def drawing_from(word: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) for the block; afterwards they are as before."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002 - timm's
    random.seed(word)
    np.random.seed([word & 0xFFFFFFFF, word >> 32])  # noqa: NPY002
    torch.default_generator.manual_seed(word >> 1)
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.default_generator.set_state(of_torch)


class Recolour:
    """RandAugment or another policy of timm's, and colour jitter, on 8-bit pictures that are cropped already.

    Operations fill with the mean colour, resample bicubically and shift by up to 45 % of the side, as in timm's
    training transforms. Unlike there, colour jitter is not dropped when a policy is given too: what is set is done.

    Args:
        auto: timm's description of a policy ("rand-m9-mstd0.5-inc1"); None for none.
        color_jitter: largest change of brightness, contrast and saturation, as a share; 0 for none.
        size: (H, W) of the pictures.
        mean: of each channel, in 0..1.

    Raises:
        ConfigError: a description that timm does not read, or data that are not pictures.
    """

    def __init__(self, auto: str | None, color_jitter: float, *, size: tuple[int, int], mean: Sequence[float]) -> None:
        self._transform: Callable[[Image.Image], Image.Image] | None = None
        self.channels = len(mean)
        if not auto and not color_jitter:
            return
        if self.channels not in (1, 3):
            raise ConfigError(
                f"augment.auto and augment.color_jitter are for pictures of 1 or 3 channels, and data.channels="
                f"{self.channels}; set augment.auto=none and augment.color_jitter=0"
            )
        self._transform = _timm_transform(auto, color_jitter, size, mean)

    def __call__(self, image: Tensor, word: int) -> Tensor:
        """(H, W, C) uint8 to the same; ``word`` seeds what is drawn.

        Raises:
            DataError: pixels of another type.
        """
        if self._transform is None:
            return image
        if image.dtype != torch.uint8:
            raise DataError(
                f"augment.auto and augment.color_jitter need 8-bit pictures, and one has {image.dtype} values; set "
                "augment.auto=none and augment.color_jitter=0"
            )
        pixels = image.expand(-1, -1, self.channels).contiguous().numpy()
        with drawing_from(word):
            changed = self._transform(Image.fromarray(pixels if self.channels == 3 else pixels[:, :, 0]))
        return torch.from_numpy(np.array(changed).reshape(pixels.shape))


def _timm_transform(
    auto: str | None, color_jitter: float, size: tuple[int, int], mean: Sequence[float]
) -> Callable[[Image.Image], Image.Image]:
    from timm.data.transforms_factory import transforms_imagenet_train  # as timm brings torchvision with it

    try:
        _, transform, _ = transforms_imagenet_train(
            size,
            auto_augment=auto,
            color_jitter=color_jitter or None,
            force_color_jitter=True,
            interpolation="bicubic",
            mean=tuple(mean),
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"augment.auto={auto} is no policy of timm's ({error}); expected something like rand-m9-mstd0.5-inc1, or "
            "none"
        ) from error
    for operation in _operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Any) -> Iterator[Any]:
    """The operations of timm's policies in a composed transform."""
    if isinstance(transform, list | tuple):
        for part in transform:
            yield from _operations(part)
    elif hasattr(transform, "aug_fn"):
        yield transform
    else:
        for name in ("transforms", "ops", "policy"):  # of Compose, of RandAugment and AugMix, of AutoAugment
            yield from _operations(list(getattr(transform, name, ())))


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each value. RandAugment's magnitude of 10 keeps none, which is black; Pillow refuses that
    from version 13 on, and timm asks for it nevertheless."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits_to_keep, 8))


@dataclass(frozen=True, kw_only=True)
class Erased:
    """A box in pixels, and the shape of the values that replace it in the normalised image."""

    top: int
    left: int
    height: int
    width: int
    shape: tuple[int, int, int]  # (C, height, width), (C, 1, 1) or (1, 1, 1)


def draw_erased(
    draws: Draws, *, probability: float, mode: str, size: tuple[int, int], channels: int
) -> tuple[Erased, np.ndarray] | None:
    """Random erasing (Zhong et al. 2020) as timm does it with one box: area uniform in 2 to 33 % of the image's, aspect
    ratio log-uniform in 0.3 to 1/0.3, ten attempts until the box is smaller than the image.

    Args:
        mode: pixel (each value N(0, 1)), rand (one such colour) or const (the mean).
        size: (H, W).

    Returns:
        The box and its values, float32; None where nothing is erased.
    """
    height, width = size
    values = draws.uniform(1 + 4 * _ERASE_ATTEMPTS)
    if values[0] > probability or not probability:
        return None
    low, high = math.log(_ERASE_ASPECT[0]), math.log(_ERASE_ASPECT[1])
    for u_area, u_aspect, u_top, u_left in values[1:].reshape(_ERASE_ATTEMPTS, 4).tolist():
        area = (_ERASE_AREA[0] + (_ERASE_AREA[1] - _ERASE_AREA[0]) * u_area) * height * width
        aspect = math.exp(low + (high - low) * u_aspect)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            shape = {"pixel": (channels, h, w), "rand": (channels, 1, 1)}.get(mode, (1, 1, 1))
            noise = np.zeros(shape, np.float32)
            if mode != "const":
                noise = draws.generator().standard_normal(shape, np.float32)
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            return Erased(top=top, left=left, height=h, width=w, shape=shape), noise
    return None


def check_micro_batch(config: AugmentConfig, size: int) -> None:
    """Raises ConfigError where mixup or cutmix find an image without a partner."""
    if config.mixes and size % 2:
        raise ConfigError(
            f"augment.mixup and augment.cutmix mix images in pairs, and a micro-batch has {size}; make "
            "train.batch_size / (processes x train.accumulate) even, or set augment.mixup=0 augment.cutmix=0"
        )


def finish_batch(
    batch: LabelledBatch, *, config: AugmentConfig, mean: Sequence[float], std: Sequence[float], num_classes: int
) -> tuple[Tensor, Tensor]:
    """What is left to do where the model is: normalise, erase, mix.

    Args:
        batch: on the model's device. Features instead of images, (N, D), are left as they are.

    Returns:
        images (N, C, H, W) float32; targets (N,) int64, or, where images may be mixed, (N, classes) float32 with
        ``config.smoothing`` in them.
    """
    if batch.images.ndim == 2:
        return batch.images, batch.labels
    images = normalise(batch.images, mean, std)
    start = 0
    for place, erased in batch.erased:
        end = start + math.prod(erased.shape)
        values = batch.noise[start:end].view(erased.shape)
        start = end
        images[place, :, erased.top : erased.top + erased.height, erased.left : erased.left + erased.width] = values
    if not config.mixes:
        return images, batch.labels
    with drawing_from(batch.word):
        return _mixup(config, num_classes)(images, batch.labels)


def _mixup(config: AugmentConfig, num_classes: int) -> Any:
    from timm.data.mixup import Mixup

    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.switch_prob,
        mode="batch",
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )
