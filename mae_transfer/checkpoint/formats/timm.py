"""timm's VisionTransformer: our names but for registers, whose places in the position table are its own."""

from __future__ import annotations

import re
from typing import Any

import torch

from mae_transfer.checkpoint.formats.base import Exported, Format, Tensors, check_carried
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.checkpoint.names import encoder_state
from mae_transfer.errors import CheckpointError

_CARRIED = frozenset({"registers", "layer_scale", "swiglu", "eps", "oblong"})
_HEAD = re.compile(r"^(fc_norm|head)\.(weight|bias)$")


def export(tensors: Tensors, info: EncoderInfo) -> Exported:
    """Encoder, and the head of a fine-tuned classifier.

    Registers come without places where the cls token's own place is zero, as in timm's models, or else with places
    that are zero: timm's ``no_embed_class`` says which (see ``timm_arguments``).

    Raises:
        CheckpointError: windows, relative or rotary positions, no cls token, no positions.
    """
    carried = _CARRIED | ({"no_norm"} if "fc_norm.weight" in tensors else set())
    check_carried(tensors, info, title="timm's VisionTransformer", carried=frozenset(carried))
    result = encoder_state(tensors) | {name: tensor for name, tensor in tensors.items() if _HEAD.match(name)}
    left_out = [name for name in tensors if name not in result]
    if "register_tokens" not in result:
        return Exported(tensors=result, left_out=left_out)
    registers = result.pop("register_tokens")
    cls_row, rows = result["pos_embed"][:, :1], result["pos_embed"][:, 1:]
    result["reg_token"] = registers
    result["pos_embed"] = torch.cat([cls_row, torch.zeros_like(registers), rows], dim=1) if cls_row.any() else rows
    return Exported(tensors=result, left_out=left_out, names="timm")


def restore(tensors: Tensors, info: EncoderInfo) -> Tensors:
    """The inverse of ``export``.

    Raises:
        CheckpointError: a position table of neither layout.
    """
    result = dict(tensors)
    if "reg_token" not in result:
        return result
    registers, table = result.pop("reg_token"), result["pos_embed"]
    num_patches = info.grid[0] * info.grid[1]
    if table.shape[1] == num_patches:
        cls_row, rows = torch.zeros_like(table[:, :1]), table
    elif table.shape[1] == 1 + registers.shape[1] + num_patches:
        cls_row, rows = table[:, :1], table[:, 1 + registers.shape[1] :]
        registers = registers + table[:, 1 : 1 + registers.shape[1]]
    else:
        raise CheckpointError(
            f"pos_embed has {table.shape[1]} rows; timm's has {num_patches}, or {1 + registers.shape[1]} more"
        )
    return result | {"register_tokens": registers, "pos_embed": torch.cat([cls_row, rows], dim=1)}


def timm_arguments(tensors: Tensors, info: EncoderInfo) -> dict[str, Any]:
    """What ``timm.create_model("vit_base_patch16_224", …)`` takes for a model that the exported tensors fit strictly,
    besides its layers: norms of ``info.norm_eps``, and for a gated MLP ``SwiGLUPacked`` with SiLU.

    Args:
        tensors: as exported.
    """
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    pool = "avg" if "fc_norm.weight" in tensors else "token" if classes else ""
    values: dict[str, Any] = {
        "img_size": info.image_size,
        "patch_size": info.patch_size,
        "in_chans": info.channels,
        "embed_dim": info.width,
        "depth": info.depth,
        "num_heads": info.num_heads,
        "mlp_ratio": info.mlp_ratio * (2 if info.ffn == "swiglu" else 1),  # timm counts both halves of a gated one
        "num_classes": classes,
        "global_pool": pool,
    }
    if "blocks.0.ls1.gamma" in tensors:
        values["init_values"] = 1.0
    if "reg_token" in tensors:
        values["reg_tokens"] = tensors["reg_token"].shape[1]
        values["no_embed_class"] = tensors["pos_embed"].shape[1] == info.grid[0] * info.grid[1]
    return values


TIMM = Format(
    name="timm",
    title="timm's VisionTransformer",
    export=export,
    endings=(".safetensors", ".pth"),
    library="timm",
)
