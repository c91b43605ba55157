"""An encoder that holds a checkpoint, built from what the checkpoint says of itself."""

from __future__ import annotations

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


def empty_encoder(info: EncoderInfo) -> VisionTransformer:
    """The encoder without memory for its weights: names and shapes.

    Raises:
        ConfigError: numbers that do not go together.
    """
    with torch.device("meta"):
        return VisionTransformer(**vit_arguments(info))
