"""Work of a run by formula."""

from __future__ import annotations

from pretrain.masking import num_visible
from pretrain.model import MaskedAutoencoder


def forward_flops(model: MaskedAutoencoder, *, mask_ratio: float | None = None) -> int:
    """Floating-point operations of one image's forward pass, a multiplication and an addition counting as two.

    Matrix products only, which are all but a few per cent: projections, attention, and the head, which training
    applies to the hidden patches alone.
    """
    num_patches = model.grid[0] * model.grid[1]
    visible = num_visible(num_patches, model.mask_ratio if mask_ratio is None else mask_ratio)
    width, decoder_width = model.width, model.decoder_width
    values = model.patch_size[0] * model.patch_size[1] * model.num_channels
    encoded = 1 + (num_patches if model.mask_tokens_in_encoder else visible)  # tokens, with cls
    return (
        2 * visible * values * width  # patch embedding
        + model.depth * block_flops(encoded, width, model.get_parameter("blocks.0.mlp.fc1.weight").shape[0])
        + 2 * encoded * width * decoder_width
        + model.decoder_depth
        * block_flops(1 + num_patches, decoder_width, model.get_parameter("decoder_blocks.0.mlp.fc1.weight").shape[0])
        + 2 * (num_patches - visible) * decoder_width * values
    )


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """One transformer block: qkv and output projection, attention, MLP."""
    return 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width


def training_flops(model: MaskedAutoencoder, *, mask_ratio: float | None = None) -> int:
    """Of one image's forward and backward pass: the backward pass multiplies each matrix twice."""
    return 3 * forward_flops(model, mask_ratio=mask_ratio)
