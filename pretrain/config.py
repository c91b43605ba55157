"""What a pretraining run is made of; keys are those of the command line (``data.path``, ``train.epochs`` …)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mae_transfer.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from mae_transfer.data.decode import check_channels, is_picture
from mae_transfer.data.scan import user_cache
from mae_transfer.engine.checkpoints import CheckpointConfig
from mae_transfer.engine.metrics import LogConfig
from mae_transfer.engine.optimizer import OptimConfig
from mae_transfer.engine.run_folder import RunConfig
from mae_transfer.engine.trainer import TrainConfig
from mae_transfer.errors import ConfigError
from mae_transfer.probe import ProbeConfig
from mae_transfer.sizes import get_size
from pretrain.masking import build_sampler
from pretrain.model import check_variants

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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and what is done to them (paper, Table 8: random resized crop and flip, nothing else)."""

    path: Any = None  # a folder of images, of .tar shards or of .parquet files, or a `datasets` folder; or a list
    val_path: Any = None  # unseen images for the loss and the pictures; null for none
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
    def roots(self) -> list[Path]:
        if self.path is None:
            raise ConfigError("data.path is not set; name the folder that holds the images: data.path=FOLDER")
        return folders(self.path)

    @property
    def val_roots(self) -> list[Path]:
        return folders(self.val_path) if self.val_path is not None else []

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel; ImageNet's, or their luma for grayscale, where none is given."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        gray = self.channels == 1
        mean = [sum(w * m for w, m in zip(LUMA, IMAGENET_MEAN, strict=True))] if gray else list(IMAGENET_MEAN)
        std = [sum(w * s for w, s in zip(LUMA, IMAGENET_STD, strict=True))] if gray else list(IMAGENET_STD)
        return (self.mean or mean, self.std or std)


def folders(value: Any) -> list[Path]:
    return [Path(str(folder)) for folder in (value if isinstance(value, list | tuple) else [value])]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A size of ``mae_transfer.sizes``; what is null comes from there."""

    size: str = "base"
    patch_size: Any = None
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    norm_pix_loss: bool = True
    mask_tokens_in_encoder: bool = False  # the paper's ablation (Table 1c)
    positions: str = "sincos"  # sincos: fixed; learned: the tables train from there (arXiv 2010.11929)
    decoder: str = "self"  # self: the paper's; cross: CrossMAE's, mask tokens read the encoder only (arXiv 2401.14391)
    cross_prediction_ratio: float = 0.25  # with cross: share of all patches that a step predicts (γ)
    cross_fuse_features: bool = True  # with cross: each decoder block reads a learned mixture of all encoder blocks
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        get_size(self.size)
        if self.patch_size is not None:
            pair(self.patch_size, "model.patch_size")
        for key in ("width", "depth", "num_heads", "decoder_dim", "decoder_depth", "decoder_num_heads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}={value} must be at least 1")
        check_variants(self.positions, self.decoder, self.cross_prediction_ratio, self.mask_tokens_in_encoder)

    @property
    def patch(self) -> tuple[int, int]:
        size = get_size(self.size).patch_size if self.patch_size is None else self.patch_size
        return pair(size, "model.patch_size")

    @property
    def overrides(self) -> dict[str, Any]:
        """What is set here and goes to ``build_mae`` in place of the size's own number."""
        keys = ("width", "depth", "num_heads", "decoder_dim", "decoder_depth", "decoder_num_heads")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches are hidden (paper, Section 4.1)."""

    kind: str = "random"
    ratio: float = 0.75


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    run: RunConfig = field(default_factory=RunConfig)
    init_checkpoint: str | None = None  # weights to start from, to go on pretraining on other images; null: random

    def __post_init__(self) -> None:
        (height, width), (p_h, p_w) = self.data.size, self.model.patch
        if height % p_h or width % p_w:
            raise ConfigError(
                f"data.image_size={self.data.image_size} is not a whole number of patches of {p_h}x{p_w}; "
                f"nearest: [{_nearest_multiple(height, p_h)}, {_nearest_multiple(width, p_w)}]"
            )
        build_sampler(self.mask.kind, self.grid, self.mask.ratio)
        if self.model.decoder == "cross" and self.model.cross_prediction_ratio > self.mask.ratio:
            raise ConfigError(
                f"model.cross_prediction_ratio={self.model.cross_prediction_ratio} of all patches cannot be predicted "
                f"where mask.ratio={self.mask.ratio} are hidden; give at most the mask ratio"
            )

    def resolved(self) -> PretrainConfig:
        """The same run with everything spelt out that a size or the number of channels implies."""
        mean, std = self.data.normalisation
        size, model = get_size(self.model.size), self.model
        return replace(
            self,
            data=replace(self.data, image_size=list(self.data.size), mean=mean, std=std),
            model=replace(
                model,
                patch_size=list(model.patch),
                width=model.width or size.width,
                depth=model.depth or size.depth,
                num_heads=model.num_heads or size.num_heads,
                decoder_dim=model.decoder_dim or size.decoder_width,
                decoder_depth=model.decoder_depth or size.decoder_depth,
                decoder_num_heads=model.decoder_num_heads or size.decoder_num_heads,
            ),
        )

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What ``build_mae`` takes for the model of this run."""
        model = self.model
        return {
            "size": model.size,
            "image_size": self.data.size,
            "patch_size": model.patch,
            "channels": self.data.channels,
            "mask_ratio": self.mask.ratio,
            "norm_pix_loss": model.norm_pix_loss,
            "mask_tokens_in_encoder": model.mask_tokens_in_encoder,
            "positions": model.positions,
            "decoder": model.decoder,
            "cross_prediction_ratio": model.cross_prediction_ratio,
            "cross_fuse_features": model.cross_fuse_features,
            "checkpointing": model.checkpointing,
            **model.overrides,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches."""
        (height, width), (p_h, p_w) = self.data.size, self.model.patch
        return height // p_h, width // p_w


def _nearest_multiple(value: int, step: int) -> int:
    return max(1, round(value / step)) * step
