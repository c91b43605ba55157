"""MAE's own decoder: whether a file has the whole of one, so that no half of it is written."""

from __future__ import annotations

import re
from math import prod

from mae_transfer.checkpoint.formats.base import Tensors
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.checkpoint.names import shape_text, summarise
from mae_transfer.errors import CheckpointError

_BLOCK = re.compile(r"^decoder_blocks\.(\d+)\.")


def has_decoder(tensors: Tensors) -> bool:
    """Whether there is any of a decoder."""
    return any(name.startswith("decoder_") for name in tensors)


def decoder_depth(tensors: Tensors) -> int:
    """Blocks of the decoder, by the highest number of one."""
    return 1 + max((int(match[1]) for name in tensors if (match := _BLOCK.match(name))), default=-1)


def check_decoder(tensors: Tensors, info: EncoderInfo) -> None:
    """Raises CheckpointError, by name, where a decoder of MAE's (of self-attention) lacks tensors or has them in shapes
    that do not go together."""
    expected = _shapes(tensors, info)
    if absent := [name for name in expected if name not in tensors]:
        raise CheckpointError(f"the decoder lacks {summarise(absent)}; --encoder-only leaves it out")
    others = [
        f"{name} is {shape_text(tensors[name])}, expected {'x'.join(map(str, shape))}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise CheckpointError(
            f"the decoder is of shapes that do not go together: {', '.join(others[:3])}{more}; --encoder-only leaves "
            "it out"
        )


def _shapes(tensors: Tensors, info: EncoderInfo) -> dict[str, tuple[int, ...]]:
    """Every tensor of a decoder as wide and deep as this one, and its shape."""
    width = _length(tensors, "decoder_norm.weight")
    hidden = _length(tensors, "decoder_blocks.0.mlp.fc1.bias")
    pixels = prod(info.patch_size) * info.channels
    block: dict[str, tuple[int, ...]] = {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    layers: dict[str, tuple[int, ...]] = {"decoder_embed": (width, info.width)}
    for number in range(max(1, decoder_depth(tensors))):
        layers |= {f"decoder_blocks.{number}.{layer}": shape for layer, shape in block.items()}
    layers |= {"decoder_norm": (width,), "decoder_pred": (pixels, width)}
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, width),
        "decoder_pos_embed": (1, 1 + prod(info.grid), width),
    }
    for layer, shape in layers.items():
        shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return shapes


def _length(tensors: Tensors, name: str) -> int:
    return tensors[name].shape[0] if name in tensors and tensors[name].ndim == 1 else 0
