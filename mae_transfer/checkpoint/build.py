"""An encoder that holds a checkpoint, built from what the checkpoint says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.vit import VisionTransformer


def vit_arguments(info: EncoderInfo) -> dict[str, Any]:
    """What ``VisionTransformer`` takes to hold the encoder that ``info`` describes; any of it may be overridden."""
    return {
        "image_size": info.image_size,
        "patch_size": info.patch_size,
        "in_channels": info.channels,
        "width": info.width,
        "depth": info.depth,
        "num_heads": info.num_heads,
        "mlp_ratio": info.mlp_ratio,
        "ffn": info.ffn,
        "norm_eps": info.norm_eps,
        "layer_scale": 1.0 if info.layer_scale else None,
        "cls_token": info.cls_token,
        "num_registers": info.num_registers,
        "absolute_positions": info.absolute_positions,
        "rope_base": info.rope_base,
        "final_norm": info.final_norm,
        "window_size": info.window_size,
        "global_blocks": info.global_blocks,
        "relative_position": info.relative_position,
        "attention_image_size": info.attention_image_size,
    }


def build_backbone(path: str | Path, *, patch_resize: str | None = None, **overrides: Any) -> VisionTransformer:
    """The encoder of any supported checkpoint, of the architecture that the file is of, with its weights.

    Args:
        path: as ``load_backbone`` takes it.
        patch_resize: for another ``patch_size`` than the file's: "pinv" or "bicubic", as ``load_backbone`` takes it.
        overrides: arguments of ``VisionTransformer`` in place of the checkpoint's: another ``image_size`` resizes
            positions, ``drop_path`` trains with it, ``cls_token=False`` or ``final_norm=False`` leave theirs out.

    Raises:
        CheckpointError: as ``load_backbone``.
    """
    from mae_transfer.checkpoint.load import (
        load_checkpoint,
    )  # reads files, which check themselves by what is built here
    from mae_transfer.checkpoint.read import read_checkpoint

    checkpoint = read_checkpoint(path)
    vit = VisionTransformer(**{**vit_arguments(checkpoint.info), **overrides})
    load_checkpoint(vit, checkpoint, patch_resize=patch_resize)
    return vit


def empty_encoder(info: EncoderInfo) -> VisionTransformer:
    """The encoder without memory for its weights: names and shapes.

    Raises:
        ConfigError: numbers that do not go together.
    """
    with torch.device("meta"):
        return VisionTransformer(**vit_arguments(info))
