"""An encoder that holds a checkpoint, built from what the checkpoint says of itself."""

from __future__ import annotations

import inspect
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


SIZE_ARGUMENTS = ("width", "depth", "num_heads")
# How a block computes and what tokens it sees: under other values the weights mean nothing.
_OF_THE_WEIGHTS = ("mlp_ratio", "ffn", "norm_eps", "layer_scale", "num_registers", "absolute_positions", "rope_base")


def weights_arguments(info: EncoderInfo) -> dict[str, Any]:
    """What a host that builds the encoder by a recipe of its own must yet take from the checkpoint.

    Of ``VisionTransformer``'s arguments; only what departs from their defaults, so nothing for a published MAE. Of an
    encoder of no named size its width, depth and heads too.
    """
    defaults = inspect.signature(VisionTransformer).parameters
    own = vit_arguments(info)
    taken = {name: own[name] for name in _OF_THE_WEIGHTS if own[name] != defaults[name].default}
    if info.num_registers:
        taken["cls_token"] = True
    return taken | ({name: own[name] for name in SIZE_ARGUMENTS} if info.size == "custom" else {})


def host_conflict(info: EncoderInfo, *, window_size: int, relative_position: str | None) -> str | None:
    """Why the encoder cannot run under a host's windows and relative positions; None where it can."""
    if info.num_registers or info.rope_base is not None:
        has = "register tokens" if info.rope_base is None else "rotary positions"
        if window_size or relative_position is not None:
            return f"has {has}, which go with neither windows nor relative positions"
    elif not info.absolute_positions and relative_position != info.relative_position:
        return f"has no positions but its relative ones ({info.relative_position})"
    return None


def empty_encoder(info: EncoderInfo) -> VisionTransformer:
    """The encoder without memory for its weights: names and shapes.

    Raises:
        ConfigError: numbers that do not go together.
    """
    with torch.device("meta"):
        return VisionTransformer(**vit_arguments(info))
