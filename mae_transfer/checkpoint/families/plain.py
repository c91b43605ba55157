"""Vision Transformers whose names are ours but for a few: official MAE, timm, DeiT, DINO, MoCo v3, DINOv2."""

from __future__ import annotations

import math
import re

import torch

from mae_transfer.checkpoint.families.base import (
    Converted,
    Family,
    Raw,
    Tensors,
    ffn_of,
    has_norm,
    register_tokens,
    split_distillation,
    square_side,
    with_cls_row,
)
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.errors import CheckpointError
from mae_transfer.position import sincos_2d

ANCHOR = "patch_embed.proj.weight"
# Of other models in these names, whose blocks compute something else.
_FOREIGN = {
    r"^norm_pre\.": "a norm before the first block (CLIP)",
    r"\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"^attn_pool\.": "attention pooling (SigLIP)",
    r"\.mlp\.fc1_[gx]\.": "a gated MLP of two layers (EVA)",
}
# Patches of the released models of families whose names others have too, by width.
_PATCHES = {
    "mae-finetuned": {768: 16, 1024: 16, 1280: 14},
    "dinov2": {384: 14, 768: 14, 1024: 14, 1536: 14},
}
_BLOCK = re.compile(r"^blocks\.(?:\d+\.)?(\d+)\.")  # official DINOv2 nests blocks in chunks while it trains

_OTHER_NAMES = (
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),  # official DINOv2
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),  # official DeiT III
)


def convert_plain(raw: Raw) -> Converted:
    """Names that differ, tokens besides cls, and tables without a cls row.

    A distillation token (DeiT) becomes a register. A table without a cls row (timm's with registers, DeiT III) gets a
    row of zeros: the file's cls token has its position in it, or the model has none (timm's ``class_token=False``).
    """
    for pattern, what in _FOREIGN.items():
        if any(re.search(pattern, name) for name in raw.tensors):
            raise CheckpointError(f"{raw.path} is a Vision Transformer with {what}, which this encoder does not have")
    tensors: Tensors = {}
    for name, tensor in raw.tensors.items():
        name = _BLOCK.sub(r"blocks.\1.", name)
        for theirs, ours in _OTHER_NAMES:
            name = theirs.sub(ours, name)
        tensors[name] = tensor
    fields: dict[str, object] = {"layer_scale": any(name.endswith("ls1.gamma") for name in tensors)}
    fields["ffn"] = ffn_of(tensors, raw.path)
    for name in ("reg_token", "dist_token"):
        if name in tensors:
            tensors["register_tokens"] = tensors.pop(name)
    if "mask_token" in tensors and tensors["mask_token"].ndim == 2:
        del tensors["mask_token"]  # DINOv2's stands in the encoder, which nothing here hides patches from
    if not any(name.endswith(".attn.qkv.bias") for name in tensors):  # timm's qkv_bias=False
        weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".attn.qkv.weight")}
        tensors |= {name.removesuffix("weight") + "bias": w.new_zeros(w.shape[:1]) for name, w in weights.items()}
    if "pos_embed" in tensors:
        _lay_out_positions(tensors, raw)
    registers = register_tokens(tensors, raw.path)
    fields["num_registers"] = 0 if registers is None else registers.shape[1]
    fields["final_norm"] = has_norm(tensors)
    if is_moco_v3(tensors, raw.prefix) and tensors[ANCHOR].shape[0] == 384:
        fields["num_heads"] = 12  # its small model has heads of 32 (``vit_small`` of the released code), timm's of 64
    return Converted(tensors=tensors, fields=fields, left_out=list(raw.outside))


def is_released(info: EncoderInfo) -> bool:
    """Whether an encoder may be of its family's released models; not EVA in the names of a fine-tuned MAE, RADIO or
    TIPS in those of DINOv2."""
    patch = _PATCHES.get(info.family, {}).get(info.width)
    if patch is None:
        return True
    return info.patch_size == (patch, patch) and (info.family != "dinov2" or info.num_registers in (0, 4))


def is_moco_v3(tensors: Tensors, prefix: str) -> bool:
    """By what stands before the encoder in training, or by its fixed table: MAE's, the halves for rows and columns
    swapped."""
    if "base_encoder." in prefix or "momentum_encoder." in prefix:
        return True
    table = tensors.get("pos_embed")
    if table is None or table.ndim != 3 or not table.shape[1] or table.shape[2] % 4:
        return False
    side = math.isqrt(table.shape[1] - 1)
    if side * side + 1 != table.shape[1]:
        return False
    columns, rows = sincos_2d(table.shape[2], (side, side)).chunk(2, dim=2)
    return torch.allclose(table.float(), torch.cat([rows, columns], dim=2), atol=1e-4)


def _lay_out_positions(tensors: Tensors, raw: Raw) -> None:
    table = tensors["pos_embed"]
    if table.ndim != 3:
        raise CheckpointError(f"{raw.path}: pos_embed is {tuple(table.shape)}; expected (1, tokens, width)")
    if "dist_token" in raw.tensors:
        split_distillation(tensors, raw.path)
    elif "cls_token" not in tensors:
        square_side(table.shape[1], "the number of positions, in a model without cls token,", raw.path)
        tensors["pos_embed"] = with_cls_row(table)
    elif math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
        # Of a square grid without a cls row, or of n - 1 by n + 1 patches with one: n² both.
        certain = any(name == "register_tokens" or name.endswith("ls1.gamma") for name in tensors)
        if not certain and not str(raw.config.get("architecture", "")).startswith("flexivit"):
            side = math.isqrt(table.shape[1])
            raise CheckpointError(
                f"{raw.path}: pos_embed has {table.shape[1]} rows, which are {side}x{side} patches without a cls row "
                f"(FlexiViT) or {side - 1}x{side + 1} patches with one; nothing in the file says which. Of timm's "
                "models the config.json beside model.safetensors does, as does timm/NAME"
            )
        tensors["pos_embed"] = with_cls_row(table)


def _family(name: str, title: str, *marks: str, **more: object) -> Family:
    return Family(name=name, title=title, anchor=ANCHOR, convert=convert_plain, marks=marks, **more)  # type: ignore[arg-type]


_CLS, _POSITIONS, _QKV = r"^cls_token$", r"^pos_embed$", r"^blocks\.(\d+\.)?0\.attn\.qkv\.weight$"
_ALWAYS = (_CLS, _POSITIONS, _QKV)
FAMILIES = (
    _family("mae", "MAE, official pretraining", *_ALWAYS, r"^decoder_pred\.weight$", license="cc-by-nc-4.0"),
    _family("deit-distilled", "DeiT with a distillation token", *_ALWAYS, r"^dist_token$", license="apache-2.0"),
    _family(
        *("dinov2", "DINOv2", *_ALWAYS, r"^blocks\.(\d+\.)?0\.ls1\.gamma$"),
        r"^(mask_token|reg_token|register_tokens|blocks\.(\d+\.)?0\.mlp\.w12\.weight)$",
        license="apache-2.0",
    ),
    _family(
        *("mae-finetuned", "MAE, official fine-tuning", *_ALWAYS, r"^fc_norm\.weight$"),
        without=(r"^norm\.weight$", r"ls1\.gamma$"),
        license="cc-by-nc-4.0",
    ),
    _family("vit", "timm, DeiT, DINO, MoCo v3 or another Vision Transformer in timm's names", *_ALWAYS),
    _family(
        *("vit-gap", "timm's without a cls token", _POSITIONS, _QKV),
        without=(_CLS, r"rel_pos_[hw]$", r"_bias_table$", r"\.gamma_1$"),
    ),
)
