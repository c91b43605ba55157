"""What a format is: the names and files by which another tool reads an encoder, and what it has no place for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.checkpoint.names import summarise
from mae_transfer.errors import CheckpointError

Tensors = dict[str, Tensor]

# What a Vision Transformer may have beyond the paper's, and how to see it in tensors of our names. What leaves no
# trace in them is asked of the metadata.
_TRACES = {
    "registers": ("register tokens", r"register_tokens$"),
    "layer_scale": ("layer scale", r"blocks\.\d+\.ls[12]\.gamma$"),
    "relative": ("relative positions", r".*(rel_pos_[hw]|relative_position_bias_table)$"),
}
_LACKS = {
    "no_cls": ("no cls token", "cls_token"),
    "no_positions": ("no absolute positions", "pos_embed"),
    "no_norm": ("no norm after the last block", "norm.weight"),
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A checkpoint in a format's names.

    Attributes:
        tensors: by those names.
        left_out: our names of what the format does not hold.
        names: the key of ``formats.NAMES`` that reads the tensors back; "" where they are ours.
        files: other files of a folder, text by name.
    """

    tensors: Tensors
    left_out: list[str] = field(default_factory=list)
    names: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that checkpoints are written in.

    Attributes:
        title: for people.
        export: tensors in our names, and what is known of them, to what is written.
        endings: that a file may have; none for a folder.
        key: below which tensors stand in a .pth.
        library: that reads it, as the Hub spells it.
        decoder: whether it holds one.
    """

    name: str
    title: str
    export: Callable[[Tensors, EncoderInfo], Exported]
    endings: tuple[str, ...] = ()
    key: str = "model"
    library: str = "mae-transfer"
    decoder: bool = False


def parts(names: Iterable[str]) -> str:
    """``summarise``, with what belongs to a decoder as one: "the decoder (52 tensors), mask_token"."""
    names = list(names)
    decoder = [name for name in names if name.startswith(("decoder_", "wfm.", "dec_norms."))]
    rest = summarise(name for name in names if name not in decoder)
    return ", ".join([f"the decoder ({len(decoder)} tensors)"] * bool(decoder) + [rest] * bool(rest))


def traits(tensors: Mapping[str, Tensor], info: EncoderInfo) -> dict[str, str]:
    """What an encoder has beyond the paper's: a word for each, and what to call it."""
    found = {
        key: title
        for key, (title, pattern) in _TRACES.items()
        if any(re.match(pattern, name) for name in tensors if not name.startswith("decoder_"))
    }
    found |= {key: title for key, (title, name) in _LACKS.items() if name not in tensors}
    said = {
        "rope": ("rotary positions", info.rope_base is not None),
        "windows": ("windowed attention", info.window_size > 0),
        "swiglu": ("a gated MLP", info.ffn != "mlp"),
        "eps": (f"norms of eps {info.norm_eps:g}", info.norm_eps != 1e-6),
        "oblong": (f"patches of {info.patch_size[0]}x{info.patch_size[1]}", info.patch_size[0] != info.patch_size[1]),
    }
    return found | {key: title for key, (title, there) in said.items() if there}


def check_carried(
    tensors: Mapping[str, Tensor], info: EncoderInfo, *, title: str, carried: frozenset[str] = frozenset()
) -> None:
    """Raises CheckpointError, by name, where an encoder has what a format has no place for.

    Args:
        carried: words of ``traits`` that it has a place for.
    """
    foreign = [name for word, name in traits(tensors, info).items() if word not in carried]
    if foreign:
        raise CheckpointError(
            f"{title} cannot carry this encoder, which has {', '.join(foreign)}; nothing is written. "
            "Format backbone (.safetensors) carries everything"
        )
