"""DINOv3: rotary positions, registers ("storage tokens"), layer scale, keys whose bias is masked."""

from __future__ import annotations

import re

import torch

from mae_transfer.checkpoint.families.base import (
    Converted,
    Family,
    Raw,
    Tensors,
    config_fields,
    has_norm,
    join_biases,
    join_qkv,
    need,
    register_tokens,
    rename,
)
from mae_transfer.checkpoint.families.plain import ANCHOR
from mae_transfer.errors import CheckpointError

ROPE_BASE = 100.0
_P = r"(weight|bias)"
_PLAIN = [  # official and timm's
    (r"cls_token", "cls_token"),
    (r"(?:storage_tokens|reg_token)", "register_tokens"),
    (r"(mask_token|rope_embed\.periods)", ""),
    (rf"(patch_embed\.proj)\.{_P}", r"\1.\2"),
    (rf"(blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2))\.{_P}", r"\1.\2"),
    (r"(blocks\.\d+\.attn\.qkv)\.bias_mask", r"\1.bias_mask"),
    (r"(blocks\.\d+\.attn\.[qv]_bias)", r"\1"),
    (rf"(blocks\.\d+\.mlp)\.(?:w1|fc1_g)\.{_P}", r"\1.gate.\2"),
    (rf"(blocks\.\d+\.mlp)\.(?:w2|fc1_x)\.{_P}", r"\1.up.\2"),
    (rf"(blocks\.\d+\.mlp)\.w3\.{_P}", r"\1.fc2.\2"),
    (r"(blocks\.\d+)\.(?:gamma_|ls)([12])(?:\.gamma)?", r"\1.ls\2.gamma"),
    (rf"norm\.{_P}", r"norm.\1"),
    (rf"head\.{_P}", r"head.\1"),
]
_LAYER = r"(?:model\.)?layer\.(\d+)\."
_HUGGINGFACE = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "register_tokens"),
    (r"embeddings\.mask_token", ""),
    (rf"embeddings\.patch_embeddings\.{_P}", r"patch_embed.proj.\1"),
    (rf"{_LAYER}attention\.([qkv])_proj\.{_P}", r"blocks.\1.attn.\2.\3"),
    (rf"{_LAYER}attention\.o_proj\.{_P}", r"blocks.\1.attn.proj.\2"),
    (rf"{_LAYER}(norm[12])\.{_P}", r"blocks.\1.\2.\3"),
    (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (rf"{_LAYER}mlp\.gate_proj\.{_P}", r"blocks.\1.mlp.gate.\2"),
    (rf"{_LAYER}mlp\.up_proj\.{_P}", r"blocks.\1.mlp.up.\2"),
    (rf"{_LAYER}mlp\.down_proj\.{_P}", r"blocks.\1.mlp.fc2.\2"),
    (rf"norm\.{_P}", r"norm.\1"),
]


def convert_plain(raw: Raw) -> Converted:
    """Official and timm's names."""
    tensors, left_out = rename(raw.tensors, _PLAIN)
    join_biases(tensors, raw.path)
    for name in [name for name in tensors if name.endswith(".qkv.weight")]:
        bias = name.removesuffix("weight") + "bias"
        rows = tensors[name].shape[0]
        given = tensors.get(bias, tensors[name].new_zeros(rows)).clone()
        if tensors.pop(f"{bias}_mask", None) is not None:
            given[rows // 3 : 2 * rows // 3] = 0  # what the mask does: keys have no bias
        tensors[bias] = given
    converted = _finish(raw, tensors, left_out)
    width = need(tensors, "cls_token", raw.path).shape[2]
    periods = raw.tensors.get("rope_embed.periods")
    if periods is None:  # timm's names: of the published sizes the 7B alone has heads of 128
        converted.fields["num_heads"] = max(1, width // (128 if width == 4096 else 64))
    else:
        _check_periods(periods, raw)
        converted.fields["num_heads"] = width // (4 * len(periods))
    return converted


def convert_huggingface(raw: Raw) -> Converted:
    """Hugging Face's names."""
    tensors, left_out = rename(raw.outside | raw.tensors, _HUGGINGFACE)
    converted = _finish(raw, join_qkv(tensors, r"blocks\.\d+\.attn\.", raw.path), left_out)
    converted.fields.update(config_fields(raw.config))
    activation = "silu" if converted.fields["ffn"] == "swiglu" else "gelu"
    if raw.config.get("hidden_act", activation) != activation:
        raise CheckpointError(
            f"{raw.path.parent / 'config.json'}: hidden_act is {raw.config['hidden_act']!r}; an encoder whose "
            f"feed-forward is {converted.fields['ffn']} has {activation!r} here"
        )
    converted.fields["rope_base"] = float(raw.config.get("rope_theta", ROPE_BASE))
    return converted


def _check_periods(periods: torch.Tensor, raw: Raw) -> None:
    expected = ROPE_BASE ** torch.linspace(0, 1, len(periods) + 1, dtype=torch.float64)[:-1]
    if not torch.allclose(periods.double(), expected, rtol=1e-2):  # the files have them in bf16
        raise CheckpointError(
            f"{raw.path}: rope_embed.periods are not those of base {ROPE_BASE:g}; this encoder's rotary positions are"
        )


def _finish(raw: Raw, tensors: Tensors, left_out: list[str]) -> Converted:
    ffn = "mlp"
    for name in [name for name in tensors if re.search(r"\.mlp\.gate\.(weight|bias)$", name)]:
        ffn = "swiglu"  # ours has both in one layer, the gate first
        up = name.replace(".gate.", ".up.")
        tensors[name.replace(".gate.", ".fc1.")] = torch.cat([tensors.pop(name), need(tensors, up, raw.path)])
        del tensors[up]
    if ffn == "mlp":  # an MLP's first layer is called as a gate's partner
        tensors = {name.replace(".mlp.up.", ".mlp.fc1."): tensor for name, tensor in tensors.items()}
    patch = need(tensors, ANCHOR, raw.path).shape[2:]
    registers = register_tokens(tensors, raw.path)
    fields = {
        "image_size": (224 // patch[0] * patch[0], 224 // patch[1] * patch[1]),  # any: positions are computed
        "norm_eps": 1e-5,
        "num_registers": 0 if registers is None else registers.shape[1],
        "absolute_positions": False,
        "rope_base": ROPE_BASE,
        "layer_scale": any(name.endswith("ls1.gamma") for name in tensors),
        "ffn": ffn,
        "final_norm": has_norm(tensors),
    }
    return Converted(tensors=tensors, fields=fields, left_out=left_out)


_LICENSE = "other"  # "DINOv3 License", Meta's own
FAMILIES = (
    Family(
        name="dinov3",
        title="DINOv3, official or timm's names",
        anchor=ANCHOR,
        convert=convert_plain,
        marks=(
            r"^cls_token$",
            r"^(storage_tokens|reg_token)$",
            r"^blocks\.0\.attn\.qkv\.weight$",
            r"^blocks\.0\.(gamma_1|ls1\.gamma)$",
        ),
        without=(r"^pos_embed$", r"relative_position_bias_table$"),
        license=_LICENSE,
    ),
    Family(
        name="hf-dinov3",
        title="Hugging Face DINOv3",
        anchor="embeddings.patch_embeddings.weight",
        convert=convert_huggingface,
        marks=(r"^embeddings\.cls_token$", r"layer\.0\.attention\.q_proj\.weight$"),
        license=_LICENSE,
        model_types=("dinov3_vit",),
    ),
)
