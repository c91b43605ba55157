"""Hugging Face's names: ViTMAE, ViT, DeiT, DINOv2. Queries, keys and values are layers of their own."""

from __future__ import annotations

import re

from mae_transfer.checkpoint.families.base import (
    HALF,
    Converted,
    Family,
    Raw,
    config_fields,
    ffn_of,
    has_norm,
    join_qkv,
    register_tokens,
    rename,
    split_distillation,
)
from mae_transfer.checkpoint.info import IMAGENET_MEAN, IMAGENET_STD
from mae_transfer.errors import CheckpointError

ANCHOR = "embeddings.patch_embeddings.projection.weight"
_P = r"(weight|bias)"
_LAYER = r"(?:encoder\.)?layer\.(\d+)\."
_ENCODER = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.(?:register_tokens|distillation_token)", "register_tokens"),
    (rf"embeddings\.patch_embeddings\.projection\.{_P}", r"patch_embed.proj.\1"),
    (rf"{_LAYER}attention\.attention\.(q)uery\.{_P}", r"blocks.\1.attn.\2.\3"),
    (rf"{_LAYER}attention\.attention\.(k)ey\.{_P}", r"blocks.\1.attn.\2.\3"),
    (rf"{_LAYER}attention\.attention\.(v)alue\.{_P}", r"blocks.\1.attn.\2.\3"),
    (rf"{_LAYER}attention\.output\.dense\.{_P}", r"blocks.\1.attn.proj.\2"),
    (rf"{_LAYER}intermediate\.dense\.{_P}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_LAYER}output\.dense\.{_P}", r"blocks.\1.mlp.fc2.\2"),
    (rf"{_LAYER}(?:norm1|layernorm_before)\.{_P}", r"blocks.\1.norm1.\2"),
    (rf"{_LAYER}(?:norm2|layernorm_after)\.{_P}", r"blocks.\1.norm2.\2"),
    (rf"{_LAYER}mlp\.(fc[12])\.{_P}", r"blocks.\1.mlp.\2.\3"),
    (rf"{_LAYER}mlp\.weights_in\.{_P}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_LAYER}mlp\.weights_out\.{_P}", r"blocks.\1.mlp.fc2.\2"),
    (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (rf"layernorm\.{_P}", r"norm.\1"),
]
_DECODER = [
    (r"decoder\.mask_token", "mask_token"),
    (r"decoder\.decoder_pos_embed", "decoder_pos_embed"),
    (rf"decoder\.(decoder_embed|decoder_norm|decoder_pred)\.{_P}", r"\1.\2"),
]
# A decoder's layers have the encoder's names: these come off first, and go back on as decoder_blocks.
_DECODER_LAYER = re.compile(r"^decoder\.(?:decoder_encoder\.layer|decoder_layers)\.")


def convert_huggingface(raw: Raw) -> Converted:
    """Every layer under our names; a decoder under the official ones, and a classification head as ``head``."""
    encoder, rest = rename(raw.tensors, _ENCODER)
    _refuse_other_layers(rest, raw)
    tensors = join_qkv(encoder, r"blocks\.\d+\.attn\.", raw.path)
    others = raw.outside | {name: raw.tensors[name] for name in rest}
    layers = {
        _DECODER_LAYER.sub("layer.", name): tensor for name, tensor in others.items() if _DECODER_LAYER.match(name)
    }
    decoder, unknown = rename(layers, _ENCODER)
    decoder = join_qkv(decoder, r"blocks\.\d+\.attn\.", raw.path)
    tensors |= {f"decoder_{name}": tensor for name, tensor in decoder.items()}
    kept, left_out = rename(
        {name: tensor for name, tensor in others.items() if not _DECODER_LAYER.match(name)},
        [*_DECODER, (rf"(?:cls_)?classifier\.{_P}", r"head.\1")],
    )
    tensors |= kept
    # What the classes have by default, DINOv2's besides, for a file without its config.json.
    fields = {"norm_eps": 1e-6 if "blocks.0.ls1.gamma" in tensors else 1e-12} | config_fields(raw.config)
    if raw.config.get("model_type") == "vit_mae":
        fields = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | fields
    fields["layer_scale"] = any(name.endswith("ls1.gamma") for name in tensors)
    fields["final_norm"] = has_norm(tensors)
    fields["ffn"] = ffn_of(tensors, raw.path)
    if "embeddings.distillation_token" in raw.tensors:
        split_distillation(tensors, raw.path)
    registers = register_tokens(tensors, raw.path)
    fields["num_registers"] = 0 if registers is None else registers.shape[1]
    if "decoder_num_attention_heads" in raw.config:
        fields["decoder_num_heads"] = raw.config["decoder_num_attention_heads"]
        fields["normalised_target"] = raw.config.get("norm_pix_loss")
    return Converted(tensors=tensors, fields=fields, left_out=[*left_out, *unknown])


def _refuse_other_layers(names: list[str], raw: Raw) -> None:
    """What an encoder has besides what is known would be left out of what it computes."""
    others = [
        name
        for name in names
        if name.startswith(("embeddings.", "encoder.", "layer.", "layernorm.")) and name != "embeddings.mask_token"
    ]
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        raise CheckpointError(
            f"{raw.path} has Hugging Face's names and, besides those of the encoders known here (ViT, ViTMAE, DeiT, "
            f"DINOv2), {shown}: a model that computes something else, or a damaged file"
        )


def _family(name: str, title: str, *marks: str, **more: object) -> Family:
    attention = r"^(encoder\.)?layer\.0\.attention\.attention\.query\.weight$"
    marks = (r"^embeddings\.cls_token$", attention, *marks)
    return Family(name=name, title=title, anchor=ANCHOR, convert=convert_huggingface, marks=marks, **more)  # type: ignore[arg-type]


# BEiT, whose layers have the same names, stands before these.
FAMILIES = (
    _family("hf-vitmae", "Hugging Face ViTMAE for pretraining", r"^decoder\.decoder_pred\.weight$"),
    _family(
        "hf-dinov2",
        "Hugging Face DINOv2",
        r"layer\.0\.layer_scale1\.lambda1$",
        license="apache-2.0",
        model_types=("dinov2", "dinov2_with_registers"),
    ),
    _family(
        "hf-deit", "Hugging Face DeiT", r"^embeddings\.distillation_token$", license="apache-2.0", model_types=("deit",)
    ),
    _family("hf-vit", "Hugging Face ViT or ViTMAE without decoder", mean=HALF, std=HALF),
)
