"""The keys of a config's ``data`` section that pretraining and classification share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_transfer.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from mae_transfer.data.decode import check_channels, is_picture
from mae_transfer.data.scan import user_cache
from mae_transfer.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)  # how Pillow turns RGB into grayscale


def pair(value: Any, key: str) -> tuple[int, int]:
    """A size given as one number or as [height, width].

    Raises:
        ConfigError: anything else.
    """
    values = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(values, list | tuple) or len(values) != 2 or not all(type(v) is int and v > 0 for v in values):
        raise ConfigError(f"{key}={value}; expected a positive whole number or [height, width]")
    return values[0], values[1]


def folders(value: Any) -> list[Path]:
    """One path or a list of them, as a list."""
    return [Path(str(folder)) for folder in (value if isinstance(value, list | tuple) else [value])]


def check_whole_patches(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raises ConfigError where images of (H, W) pixels are no whole number of patches, naming the nearest that are."""
    (height, width), (p_h, p_w) = image_size, patch_size
    if height % p_h or width % p_w:
        raise ConfigError(
            f"data.image_size={[height, width]} is not a whole number of patches of {p_h}x{p_w}; "
            f"nearest: [{_nearest_multiple(height, p_h)}, {_nearest_multiple(width, p_w)}]"
        )


def _nearest_multiple(value: int, step: int) -> int:
    return max(1, round(value / step)) * step


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How images are read and handed to a model, whatever they are for."""

    image_size: Any = 224  # one number or [height, width]
    channels: int = 3  # 1 or 3: pictures; any other number: TIFF or NumPy files, which need mean and std
    mean: list[float] | None = None  # of values in 0..1 (of float files: of their values); ImageNet's by default
    std: list[float] | None = None
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    repeats: int = 1  # crops of each decoded image; a batch is of so many times fewer images
    workers: int = 4  # processes that decode; 0 decodes in the training process
    cache: str = "none"  # ram: decode every image once and keep it
    cache_gib: float = 4.0  # refuse a larger cache
    scan_cache: Any = True  # keep the list of a large folder's files: in ~/.cache/mae-transfer, in a folder, or false
    max_unreadable: float = 0.01  # share of images that may be unreadable before the run stops

    def __post_init__(self) -> None:
        pair(self.image_size, "data.image_size")
        check_channels(self.channels)
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) != self.channels:
                raise ConfigError(f"data.{key} has {len(values)} values; data.channels={self.channels} needs as many")
        if not is_picture(self.channels) and not self.own_statistics:
            raise ConfigError(
                f"data.channels={self.channels} has no default normalisation; give data.mean=[…] and data.std=[…] with "
                f"{self.channels} values each, in units of 0..1 for uint8 and uint16 files, as they are for float files"
            )
        if self.repeats < 1:
            raise ConfigError(f"data.repeats={self.repeats} must be at least 1")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"data.std={self.std} must be positive")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"data.crop_scale={self.crop_scale}; expected [low, high] with 0 < low <= high <= 1")
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must not be negative")
        if self.cache not in ("none", "ram"):
            raise ConfigError(f"data.cache={self.cache}; use none or ram")
        if not 0 <= self.max_unreadable <= 1:
            raise ConfigError(f"data.max_unreadable={self.max_unreadable} must lie between 0 and 1")

    @property
    def own_statistics(self) -> bool:
        """Whether mean and deviation are given rather than ImageNet's."""
        return self.mean is not None and self.std is not None

    @property
    def scan_cache_folder(self) -> Path | None:
        """Where lists of files are kept, if they are."""
        if isinstance(self.scan_cache, bool):
            return user_cache() if self.scan_cache else None
        return Path(str(self.scan_cache)).expanduser() if self.scan_cache is not None else None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return pair(self.image_size, "data.image_size")

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel; ImageNet's, or their luma for grayscale, where none is given."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        gray = self.channels == 1
        mean = [sum(w * m for w, m in zip(LUMA, IMAGENET_MEAN, strict=True))] if gray else list(IMAGENET_MEAN)
        std = [sum(w * s for w, s in zip(LUMA, IMAGENET_STD, strict=True))] if gray else list(IMAGENET_STD)
        return (self.mean or mean, self.std or std)
