"""What a pretraining run is made of; keys are those of the command line (``data.path``, ``train.epochs`` …)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mae_transfer.data.settings import ImagesConfig, check_whole_patches, folders, pair
from mae_transfer.engine.checkpoints import CheckpointConfig
from mae_transfer.engine.metrics import LogConfig as EngineLogConfig
from mae_transfer.engine.optimizer import OptimConfig
from mae_transfer.engine.run_folder import RunConfig
from mae_transfer.engine.trainer import TrainConfig
from mae_transfer.errors import ConfigError
from mae_transfer.probe import ProbeConfig
from mae_transfer.sizes import get_size
from pretrain.masking import build_sampler
from pretrain.model import check_variants


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """Images and what is done to them (paper, Table 8: random resized crop and flip, nothing else)."""

    path: Any = None  # a folder of images, of .tar shards or of .parquet files, or a `datasets` folder; or a list
    val_path: Any = None  # unseen images for the loss and the pictures; null for none

    @property
    def roots(self) -> list[Path]:
        if self.path is None:
            raise ConfigError("data.path is not set; name the folder that holds the images: data.path=FOLDER")
        return folders(self.path)

    @property
    def val_roots(self) -> list[Path]:
        return folders(self.val_path) if self.val_path is not None else []


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
class LogConfig(EngineLogConfig):
    """What is recorded along the way, and how often."""

    evaluate_every_epochs: float = 10.0  # loss on data.val_path; 0 for never
    evaluate_images: int = 2000  # at most so many of data.val_path
    reconstruct_every_epochs: float = 20.0  # a picture of the same few images; 0 for never
    reconstruct_images: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruct_every_epochs < 0:
            raise ConfigError(
                f"log.reconstruct_every_epochs={self.reconstruct_every_epochs} must not be negative; 0 means never"
            )
        for name in ("evaluate_images", "reconstruct_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"log.{name}={getattr(self, name)} must be at least 1")


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
        check_whole_patches(self.data.size, self.model.patch)
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
