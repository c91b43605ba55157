"""BEiT and BEiT v2: relative tables instead of positions, layer scale, and no bias on keys."""

from __future__ import annotations

import re

import torch

from mae_transfer.checkpoint.families import huggingface
from mae_transfer.checkpoint.families.base import (
    HALF,
    Converted,
    Family,
    Raw,
    config_fields,
    has_norm,
    join_biases,
    join_qkv,
    need,
    rename,
    square_side,
)
from mae_transfer.checkpoint.families.plain import ANCHOR

_TABLE = "relative_position_bias_table"
_P = r"(weight|bias)"
_OFFICIAL = [
    (r"(cls_token|pos_embed)", r"\1"),
    (rf"(patch_embed\.proj)\.{_P}", r"\1.\2"),
    (rf"(blocks\.\d+)\.(norm1|norm2|attn\.proj|mlp\.fc1|mlp\.fc2)\.{_P}", r"\1.\2.\3"),
    (r"(blocks\.\d+\.attn\.(?:qkv\.weight|q_bias|v_bias|relative_position_bias_table))", r"\1"),
    (r"(blocks\.\d+)\.gamma_([12])", r"\1.ls\2.gamma"),
    (rf"(norm|fc_norm|head)\.{_P}", r"\1.\2"),
    (r"(?:blocks\.\d+\.attn|rel_pos_bias)\.relative_position_index", ""),  # follows from the grid
    (r"(rel_pos_bias\.relative_position_bias_table)", r"\1"),
]
_HUGGINGFACE = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (rf"embeddings\.patch_embeddings\.projection\.{_P}", r"patch_embed.proj.\1"),
    *[
        (rf"encoder\.layer\.(\d+)\.attention\.attention\.({part[0]}){part[1:]}\.{_P}", r"blocks.\1.attn.\2.\3")
        for part in ("query", "key", "value")
    ],
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.relative_position_bias\.relative_position_bias_table",
        rf"blocks.\1.attn.{_TABLE}",
    ),
    (r"encoder\.relative_position_bias\.relative_position_bias_table", f"rel_pos_bias.{_TABLE}"),
    (r"encoder\..*relative_position_index", ""),
    (rf"encoder\.layer\.(\d+)\.attention\.output\.dense\.{_P}", r"blocks.\1.attn.proj.\2"),
    (rf"encoder\.layer\.(\d+)\.intermediate\.dense\.{_P}", r"blocks.\1.mlp.fc1.\2"),
    (rf"encoder\.layer\.(\d+)\.output\.dense\.{_P}", r"blocks.\1.mlp.fc2.\2"),
    (rf"encoder\.layer\.(\d+)\.layernorm_before\.{_P}", r"blocks.\1.norm1.\2"),
    (rf"encoder\.layer\.(\d+)\.layernorm_after\.{_P}", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.lambda_([12])", r"blocks.\1.ls\2.gamma"),
    (rf"pooler\.layernorm\.{_P}", r"fc_norm.\1"),
    (rf"layernorm\.{_P}", r"norm.\1"),
    (rf"classifier\.{_P}", r"head.\1"),
]


def convert_official(raw: Raw) -> Converted:
    """``q_bias`` and ``v_bias`` with zeros between them; one table a block."""
    tensors, left_out = rename(raw.tensors, _OFFICIAL)
    join_biases(tensors, raw.path)
    return _finish(raw, tensors, left_out)


def convert_huggingface(raw: Raw) -> Converted:
    """As ``convert_official``, from Hugging Face's names."""
    tensors, left_out = rename(raw.outside | raw.tensors, _HUGGINGFACE)
    converted = _finish(raw, join_qkv(tensors, r"blocks\.\d+\.attn\.", raw.path), left_out)
    converted.fields.update(config_fields(raw.config))
    return converted


def _finish(raw: Raw, tensors: dict[str, torch.Tensor], left_out: list[str]) -> Converted:
    shared = tensors.pop(f"rel_pos_bias.{_TABLE}", None)  # pretrained: one table for all blocks
    blocks = sorted({match[1] for name in tensors if (match := re.match(r"(blocks\.\d+)\.", name))})
    if shared is not None:
        tensors |= {f"{block}.attn.{_TABLE}": shared.clone() for block in blocks}
    table = need(tensors, f"blocks.0.attn.{_TABLE}", raw.path)
    side = (square_side(table.shape[0] - 3, "the number of relative positions", raw.path) + 1) // 2
    patch = need(tensors, ANCHOR, raw.path).shape[2:]
    fields = {
        "image_size": (side * patch[0], side * patch[1]),
        "relative_position": "bias",
        "layer_scale": any(name.endswith("ls1.gamma") for name in tensors),
        "absolute_positions": "pos_embed" in tensors,
        "final_norm": has_norm(tensors),  # fine-tuned ones have fc_norm in its place
    }
    return Converted(tensors=tensors, fields=fields, left_out=left_out)


_ANY_TABLE = rf"(rel_pos_bias|blocks\.0\.attn)\.{_TABLE}$"
FAMILIES = (
    Family(
        name="beit",
        title="BEiT, official or timm's names",
        anchor=ANCHOR,
        convert=convert_official,
        marks=(r"^blocks\.0\.attn\.q_bias$", r"^blocks\.0\.attn\.v_bias$", _ANY_TABLE),
        license="mit",
        mean=HALF,
        std=HALF,
    ),
    Family(
        name="hf-beit",
        title="Hugging Face BEiT",
        anchor=huggingface.ANCHOR,
        convert=convert_huggingface,
        marks=(r"^encoder\.layer\.0\.attention\.attention\.query\.weight$", rf"^encoder\..*{_TABLE}$"),
        license="mit",
        model_types=("beit",),
        mean=HALF,
        std=HALF,
    ),
)
