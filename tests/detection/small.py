"""A small detector of ours and the arguments of its counterpart in Detectron2."""

from __future__ import annotations

from typing import Any

from torch import nn

from mae_transfer.detection import mask_rcnn

NUM_CLASSES = 3
# For ``tests.oracles.vitdet``.
VITDET: dict[str, Any] = {
    "width": 192,
    "depth": 12,
    "num_heads": 3,
    "num_classes": NUM_CLASSES,
    "image_size": 64,
    "pretrain_image_size": 32,
    "window_size": 3,
    "channels": 16,
    "box_fc_width": 32,
}


def small_detector(**overrides: Any) -> nn.Module:
    """Ours; any argument of ``mask_rcnn`` can be overridden."""
    arguments = {
        "num_classes": NUM_CLASSES,
        "image_size": 64,
        "square_size": 64,
        "position_size": 32,
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "size": "tiny",
        "window_size": 3,
        "channels": 16,
        "box_fc_width": 32,
    }
    return mask_rcnn(**{**arguments, **overrides})
