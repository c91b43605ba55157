"""What of an encoder depends on its grid or patch, brought to another: tables of positions, and the projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_transfer.checkpoint.build import empty_encoder
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.position import resize_bias_table, resize_decomposed, resize_pos_embed

if TYPE_CHECKING:  # the model imports nothing of this room, and this room needs only its type
    from mae_transfer.vit import VisionTransformer

#: How a projection gets another patch: see ``resize_projection``.
METHODS = ("pinv", "bicubic")


def fit(
    name: str,
    tensor: Tensor,
    own: Tensor,
    vit: VisionTransformer,
    info: EncoderInfo,
    *,
    patch_resize: str | None = None,
) -> Tensor:
    """``tensor`` resized to the model's ``own`` where it is a position table of another grid, or the projection of
    other patches; itself otherwise.

    Args:
        patch_resize: how a projection is resized, "pinv" or "bicubic", whatever the two patches. None: bicubically,
            and only from a side that is no power of two (14) to the nearest one (16), as ViTDet does.
    """
    if name == "patch_embed.proj.weight":
        if tensor.shape == own.shape or tensor.shape[:2] != own.shape[:2]:
            return tensor
        patch_size = (own.shape[2], own.shape[3])
        if patch_resize is not None:
            return resize_projection(tensor, patch_size, method=patch_resize)
        nearest = tuple(2 ** round(math.log2(side)) for side in info.patch_size)
        return resize_projection(tensor, patch_size) if patch_size == nearest else tensor
    if name == "pos_embed":
        if tensor.shape[2] != vit.width:
            return tensor
        return resize_pos_embed(tensor, info.grid, vit.grid)
    if not name.endswith(("rel_pos_h", "rel_pos_w", "relative_position_bias_table")):
        return tensor
    if own.shape == tensor.shape or own.shape[1] != tensor.shape[1]:
        return tensor
    if name.endswith(("rel_pos_h", "rel_pos_w")):
        return resize_decomposed(tensor, own.shape[0])
    attention = vit.get_submodule(name.rsplit(".", 1)[0])
    grid_to = attention.table_grid
    assert isinstance(grid_to, tuple)
    grid_from, patches = _table_grid(tensor, info)
    image, cls_rows = tensor[:patches], tensor[patches:]
    if not getattr(attention, "cls_token", False):
        cls_rows = cls_rows[:0]
    elif not len(cls_rows):
        cls_rows = tensor.new_zeros(3, tensor.shape[1])  # as a table begins
    return resize_bias_table(torch.cat([image, cls_rows]), grid_from, grid_to)


def _table_grid(table: Tensor, info: EncoderInfo) -> tuple[tuple[int, int], int]:
    """Grid of a table of biases and its rows for patches; three more are a cls token's."""
    h, w = info.grid
    offsets = (2 * h - 1) * (2 * w - 1)
    if len(table) in (offsets, offsets + 3):
        return info.grid, offsets
    offsets = math.isqrt(len(table)) ** 2  # of a window: no square of an odd number is three more than another
    side = (math.isqrt(offsets) + 1) // 2
    return (side, side), offsets


def resize_encoder(
    tensors: Mapping[str, Tensor],
    info: EncoderInfo,
    *,
    patch_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
    method: str = "pinv",
) -> tuple[dict[str, Tensor], EncoderInfo]:
    """An encoder for other patches or images; a decoder goes along to another image.

    Args:
        tensors: in our names.
        patch_size: None for its own. The grid stays as it is, and the image grows or shrinks with the patch, unless
            ``image_size`` says otherwise.
        image_size: (height, width) in pixels, to whose grid every position table is resized.
        method: of the projection, see ``resize_projection``.

    Raises:
        ConfigError: an image that is no whole number of patches.
        CheckpointError: other patches of a checkpoint with a decoder, which predicts their pixels.
    """
    patch = patch_size or info.patch_size
    h, w = info.grid
    image = image_size or (h * patch[0], w * patch[1])
    if patch != info.patch_size and "decoder_pred.weight" in tensors:
        raise CheckpointError(
            f"the decoder predicts the pixels of {info.patch_size[0]}x{info.patch_size[1]} patches and cannot be taken "
            f"to {patch[0]}x{patch[1]}; --encoder-only leaves it out"
        )
    attention = info.attention_image_size
    if attention is not None:  # the grid that relative tables span stays
        attention = (attention[0] // info.patch_size[0] * patch[0], attention[1] // info.patch_size[1] * patch[1])
    wanted = replace(info, patch_size=patch, image_size=image, attention_image_size=attention)
    if wanted.grid != info.grid:
        wanted = replace(wanted, positions="learned")  # a resized table is no longer the fixed one
    vit = empty_encoder(wanted)
    own = vit.state_dict()
    result = {
        name: fit(name, tensor, own[name], vit, info, patch_resize=method) if name in own else tensor
        for name, tensor in tensors.items()
    }
    if "decoder_pos_embed" in result:
        result["decoder_pos_embed"] = resize_pos_embed(result["decoder_pos_embed"], info.grid, vit.grid)
    return result, wanted


def resize_projection(weight: Tensor, patch_size: tuple[int, int], *, method: str = "bicubic") -> Tensor:
    """The patch projection (D, C, p, p) for patches of another size.

    Args:
        weight: (D, C, p_h, p_w).
        patch_size: (height, width) in pixels.
        method: "bicubic" resizes the weights as if they were pictures, values not rescaled, as ViTDet takes its huge
            encoder from 14 to 16 pixels; the code is that of its authors' next paper (Hu et al. 2022, issue 2 of
            facebookresearch/long_seq_mae). "pinv" makes a resized patch give the token that the patch gave: exactly
            so for larger patches, as nearly as can be for smaller ones (FlexiViT, Beyer et al. 2023, Section 3.4). With
            B the matrix of bicubic, antialiased resizing (timm's choice), it is the pseudo-inverse of B transposed.

    Raises:
        ConfigError: an unknown method.
    """
    if method == "bicubic":
        resized = F.interpolate(weight.float(), size=patch_size, mode="bicubic", align_corners=False)
        return resized.to(weight.dtype)
    if method != "pinv":
        raise ConfigError(f"patches are resized by {' or '.join(METHODS)}, not {method!r}")
    width, channels, p_h, p_w = weight.shape
    pictures = torch.eye(p_h * p_w, dtype=torch.float64).reshape(-1, 1, p_h, p_w)  # one for each pixel of a patch
    resized = F.interpolate(pictures, size=patch_size, mode="bicubic", align_corners=False, antialias=True)
    transposed = resized.flatten(1)  # Bᵀ, (p_h·p_w, p'_h·p'_w)
    kernels = weight.double().cpu().reshape(width * channels, p_h * p_w)
    kernels = kernels @ torch.linalg.pinv(transposed).T  # (D·C, p'_h·p'_w)
    return kernels.reshape(width, channels, *patch_size).to(weight.device, weight.dtype)
