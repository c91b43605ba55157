"""Vision Transformers whose names are ours but for a few: official MAE, timm, DeiT, DINO, MoCo v3, DINOv2."""

from __future__ import annotations

import math
import re

from mae_transfer.checkpoint.families.base import (
    Converted,
    Family,
    Raw,
    Tensors,
    ffn_of,
    has_norm,
    register_tokens,
    split_distillation,
    with_cls_row,
)
from mae_transfer.errors import CheckpointError

ANCHOR = "patch_embed.proj.weight"
# Of other models in these names, whose blocks compute something else.
_FOREIGN = {
    r"^norm_pre\.": "a norm before the first block (CLIP)",
    r"\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"^attn_pool\.": "attention pooling (SigLIP)",
    r"\.mlp\.fc1_[gx]\.": "a gated MLP of two layers (EVA)",
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
    row of zeros: the file's cls token has its position in it.
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
    if "pos_embed" in tensors:
        _lay_out_positions(tensors, raw)
    registers = register_tokens(tensors, raw.path)
    fields["num_registers"] = 0 if registers is None else registers.shape[1]
    fields["final_norm"] = has_norm(tensors)
    if "base_encoder." in raw.prefix or "momentum_encoder." in raw.prefix:
        fields |= _moco_v3(tensors)
    return Converted(tensors=tensors, fields=fields, left_out=list(raw.outside))


def _moco_v3(tensors: Tensors) -> dict[str, object]:
    """Its small model has twelve heads of 32 (``vit_small`` of the released code), timm's has six of 64."""
    return {"num_heads": 12} if tensors["patch_embed.proj.weight"].shape[0] == 384 else {}


def _lay_out_positions(tensors: Tensors, raw: Raw) -> None:
    table = tensors["pos_embed"]
    if table.ndim != 3:
        raise CheckpointError(f"{raw.path}: pos_embed is {tuple(table.shape)}; expected (1, tokens, width)")
    if "dist_token" in raw.tensors:
        split_distillation(tensors, raw.path)
    elif math.isqrt(table.shape[1]) ** 2 == table.shape[1]:  # no square is one more than another
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
)
