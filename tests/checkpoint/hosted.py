"""Encoders of other families for the tests of the hosts: timm's, in their own files, and their maps before the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from tests.checkpoint.foreign import randomised

SIDE = 64


class Foreign(NamedTuple):
    """A family's name at timm, what sets it apart from a plain encoder, and under which relative positions it runs."""

    name: str
    encoder: dict[str, Any]
    relative_position: str | None = None

    def save(self, folder: Path) -> tuple[Path, Any]:
        """A file of its "tiny" size, and the model."""
        model = randomised(timm.create_model(self.name, img_size=SIDE, embed_dim=192, num_heads=3))
        path = folder / "encoder.pth"
        torch.save(model.state_dict(), path)
        return path, model


FOREIGN = {
    "DeiT III": Foreign("deit3_small_patch16_224", {"layer_scale": 1.0}),
    "DINOv3": Foreign(
        "vit_small_patch16_dinov3",
        {
            "norm_eps": 1e-5,
            "layer_scale": 1.0,
            "num_registers": 4,
            "absolute_positions": False,
            "rope_base": 100.0,
            "cls_token": True,
        },
    ),
    "BEiT": Foreign("beit_base_patch16_224", {"layer_scale": 1.0, "absolute_positions": False}, "bias"),
}


@torch.no_grad()
def last_map(model: Any, images: Tensor) -> Tensor:
    """timm's (N, D, h, w) after the last block, before any norm."""
    return model.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]


@torch.no_grad()
def last_map_without_cls(model: Any, images: Tensor) -> Tensor:
    """As ``last_map``, of timm's blocks over the patch tokens alone, as detectors compute it."""
    patches = model.patch_embed(images)  # (N, L, D)
    patches = patches + model.pos_embed[:, -patches.shape[1] :]
    for block in model.blocks:
        patches = block(patches)
    return patches.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)
