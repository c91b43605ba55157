"""Vision Transformers whose names are ours but for a few: official MAE, timm, DeiT, DINO, MoCo v3, DINOv2."""

from __future__ import annotations

import re

import torch

from mae_transfer.checkpoint.families.base import (
    Converted,
    Family,
    Raw,
    Tensors,
    need,
    square_side,
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


def convert_plain(raw: Raw) -> Converted:
    """Names that differ, tokens besides cls, and tables without a cls row.

    A distillation token (DeiT) becomes a register, its position added to it: the two are constants, and no other place
    has both.
    """
    for pattern, what in _FOREIGN.items():
        if any(re.search(pattern, name) for name in raw.tensors):
            raise CheckpointError(f"{raw.path} is a Vision Transformer with {what}, which this encoder does not have")
    tensors: Tensors = {}
    for name, tensor in raw.tensors.items():
        name = _BLOCK.sub(r"blocks.\1.", name)
        for theirs, ours in ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2.")):
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    fields: dict[str, object] = {"layer_scale": any(name.endswith("ls1.gamma") for name in tensors)}
    first, second = (
        need(tensors, "blocks.0.mlp.fc1.weight", raw.path),
        need(tensors, "blocks.0.mlp.fc2.weight", raw.path),
    )
    if first.shape[0] == 2 * second.shape[1]:
        fields["ffn"] = "swiglu"
    for name in ("reg_token", "dist_token"):
        if name in tensors:
            tensors["register_tokens"] = tensors.pop(name)
    if "mask_token" in tensors and tensors["mask_token"].ndim == 2:
        del tensors["mask_token"]  # DINOv2's stands in the encoder, which nothing here hides patches from
    if "pos_embed" in tensors:
        _lay_out_positions(tensors, raw)
    if "register_tokens" in tensors:
        fields["num_registers"] = tensors["register_tokens"].shape[1]
    fields["final_norm"] = "norm.weight" in tensors
    return Converted(tensors=tensors, fields=fields)


def _lay_out_positions(tensors: Tensors, raw: Raw) -> None:
    table = tensors["pos_embed"]
    if table.ndim != 3:
        raise CheckpointError(f"{raw.path}: pos_embed is {tuple(table.shape)}; expected (1, tokens, width)")
    if "dist_token" in raw.tensors:  # rows of cls, distillation token and patches
        square_side(table.shape[1] - 2, "the number of patch positions", raw.path)
        tensors["register_tokens"] = tensors["register_tokens"] + table[:, 1:2]
        tensors["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    elif "reg_token" in raw.tensors and round(table.shape[1] ** 0.5) ** 2 == table.shape[1]:
        tensors["pos_embed"] = with_cls_row(table)  # timm has added the cls row to the cls token


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
