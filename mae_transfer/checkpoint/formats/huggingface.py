"""Hugging Face's ViTMAE: a folder that ``from_pretrained`` reads, written without importing transformers."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from mae_transfer.checkpoint.formats.base import Exported, Format, Tensors, check_carried
from mae_transfer.checkpoint.formats.decoder import check_decoder, decoder_depth, has_decoder
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.checkpoint.names import summarise
from mae_transfer.errors import CheckpointError

# Ours, theirs. An encoder beside a decoder stands below "vit.".
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    **{f"decoder_{part}": f"decoder.decoder_{part}" for part in ("embed", "norm", "pred")},
}
_LAYER = {
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
_QKV = ("query", "key", "value")
_BLOCK = re.compile(r"^(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)$")
_THEIR_LAYER = re.compile(r"^(?:(?:vit\.)?encoder\.layer|(decoder)\.decoder_layers)\.(\d+)\.(.+)\.(weight|bias)$")
_HEADS = re.compile(r"^(fc_norm|head|head_norm)\.")


def export(tensors: Tensors, info: EncoderInfo) -> Exported:
    """ViTMAEForPreTraining, or ViTMAEModel where there is no decoder.

    Raises:
        CheckpointError: anything beyond a plain encoder and MAE's own decoder; with a decoder, an oblong image or
            patch, of which transformers cannot build the model, or a decoder that is not whole.
    """
    decoder = has_decoder(tensors)
    carried = frozenset({"eps"} if decoder else {"eps", "oblong"})
    check_carried(tensors, info, title="Hugging Face's ViTMAE", carried=carried)
    left_out = [name for name in tensors if _HEADS.match(name)]
    left_out += [name for name in tensors if not decoder and name.endswith("mask_token")]
    prefix = "vit." if decoder else ""
    names = {name: _their_names(name, prefix=prefix) for name in tensors if name not in left_out}
    if foreign := [name for name, theirs in names.items() if not theirs]:
        raise CheckpointError(
            f"Hugging Face's ViTMAE has no place for {summarise(foreign)}; --encoder-only leaves the decoder out"
        )
    if decoder and info.grid[0] != info.grid[1]:
        raise CheckpointError(
            f"transformers builds ViTMAEForPreTraining for square grids only, not {info.grid[0]}x{info.grid[1]}; "
            "--encoder-only writes a ViTMAEModel, which may be oblong, or --image-size makes it square"
        )
    if decoder:
        check_decoder(tensors, info)
    result: Tensors = {}
    for name, theirs in names.items():
        result |= dict(zip(theirs, tensors[name].chunk(len(theirs)), strict=True))
    files = {
        "config.json": _text(config(tensors, info, decoder=decoder)),
        "preprocessor_config.json": _text(preprocessor(info)),
    }
    return Exported(tensors=result, left_out=left_out, names="hf", files=files)


def restore(tensors: Tensors, info: EncoderInfo) -> Tensors:
    """The inverse of ``export``: exactly our names and bits.

    Raises:
        CheckpointError: a name that it does not write.
    """
    whole = {theirs: ours for ours, theirs in (_EMBEDDINGS | _DECODER).items()}
    layer = {theirs: ours for ours, theirs in _LAYER.items()}
    result: Tensors = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _THEIR_LAYER.match(name):
            block = f"{'decoder_' if match[1] else ''}blocks.{match[2]}"
            if (part := match[3].removeprefix("attention.attention.")) in _QKV:
                parts.setdefault(f"{block}.attn.qkv.{match[4]}", {})[part] = tensor
                continue
            ours = f"{block}.{layer[match[3]]}.{match[4]}" if match[3] in layer else None
        else:
            stem, dot, end = name.removeprefix("vit.").rpartition(".")
            plain = name.removeprefix("vit.")
            ours = whole.get(plain) or (f"{whole[stem]}{dot}{end}" if stem in whole else None)
        if ours is None:
            raise CheckpointError(f"{name} is not a name of the folders that are written here; the file is damaged")
        result[ours] = tensor
    for name, qkv in parts.items():
        lacking = [part for part in _QKV if part not in qkv]
        if lacking:
            raise CheckpointError(f"{name} lacks its {', '.join(lacking)}; the file is damaged")
        result[name] = torch.cat([qkv[part] for part in _QKV])
    return result


def _their_names(name: str, *, prefix: str) -> list[str]:
    """One name, or three of queries, keys and values; none where there is no place."""
    if match := _BLOCK.match(name):
        layer = f"decoder.decoder_layers.{match[2]}" if match[1] else f"{prefix}encoder.layer.{match[2]}"
        if match[3] == "attn.qkv":
            return [f"{layer}.attention.attention.{part}.{match[4]}" for part in _QKV]
        return [f"{layer}.{_LAYER[match[3]]}.{match[4]}"] if match[3] in _LAYER else []
    for table, below in ((_EMBEDDINGS, prefix), (_DECODER, "")):
        stem, dot, end = name.rpartition(".")
        if name in table:
            return [below + table[name]]
        if stem in table and end in ("weight", "bias"):
            return [f"{below}{table[stem]}{dot}{end}"]
    return []


def config(tensors: Tensors, info: EncoderInfo, *, decoder: bool) -> dict[str, Any]:
    """``config.json``. A model without decoder sees the whole image: it has nothing to reconstruct."""
    values: dict[str, Any] = {
        "architectures": ["ViTMAEForPreTraining" if decoder else "ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": info.width,
        "num_hidden_layers": info.depth,
        "num_attention_heads": info.num_heads,
        "intermediate_size": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": info.norm_eps,
        "image_size": _one_or_two(info.image_size),
        "patch_size": _one_or_two(info.patch_size),
        "num_channels": info.channels,
        "qkv_bias": True,
        "mask_ratio": 0.75 if decoder else 0.0,
        "norm_pix_loss": bool(info.normalised_target),
        "torch_dtype": str(tensors["cls_token"].dtype).removeprefix("torch."),
    }
    if decoder:
        width = tensors["decoder_embed.weight"].shape[0]
        if info.decoder_num_heads is None and width % 16:
            raise CheckpointError(
                "the source does not say how many heads its decoder has, and it is none of the published ones, which "
                "have 16; --encoder-only leaves it out"
            )
        values |= {
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": decoder_depth(tensors),
            "decoder_num_attention_heads": info.decoder_num_heads or 16,  # every published decoder has 16
            "decoder_intermediate_size": tensors["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        }
    return values


def preprocessor(info: EncoderInfo) -> dict[str, Any]:
    """``preprocessor_config.json``: size, mean and deviation of the input."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": info.image_size[0], "width": info.image_size[1]},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
    }


def _one_or_two(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


HF = Format(name="hf", title="Hugging Face's ViTMAE", export=export, library="transformers", decoder=True)
