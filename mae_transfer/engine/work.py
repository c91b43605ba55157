"""Floating-point operations of a Vision Transformer by formula, a multiplication and an addition counted as two."""

from __future__ import annotations

from mae_transfer.vit import VisionTransformer


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """One transformer block: qkv and output projection, attention, MLP."""
    return 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width


def encoder_training_flops(vit: VisionTransformer, *, frozen_blocks: int | None = None) -> int:
    """One image of the model's own size through all tokens of the encoder, forward and backward; norms are left out.

    A backward pass multiplies each matrix twice. Embeddings and the first ``frozen_blocks`` blocks have none; None
    where everything trains.
    """
    num_patches = vit.grid[0] * vit.grid[1]
    tokens = num_patches + (vit.cls_token is not None)
    hidden = vit.get_parameter("blocks.0.mlp.fc1.weight").shape[0]
    embed = 2 * num_patches * vit.patch_size[0] * vit.patch_size[1] * vit.num_channels * vit.width
    block = block_flops(tokens, vit.width, hidden)
    if frozen_blocks is None:
        return 3 * (embed + vit.depth * block)
    return embed + (frozen_blocks + 3 * (vit.depth - frozen_blocks)) * block
