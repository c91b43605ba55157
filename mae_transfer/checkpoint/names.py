"""Names of an encoder's tensors, and how a person is told of many of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

# Tensors that a backbone has no use for.
_NOT_OF_THE_ENCODER = re.compile(
    r"^(decoder_|wfm\.|dec_norms\.|mask_token$|encoder_mask_token$|head\.|head_dist\.|head_norm\.)"
)


def is_encoders(name: str) -> bool:
    """Whether a tensor is the encoder's: not a decoder's, a mask token, a head's.

    ``fc_norm``, with which fine-tuning on averaged patches replaces ``norm``, is.
    """
    return not _NOT_OF_THE_ENCODER.match(name)


def encoder_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict: no decoder, no mask tokens, no heads."""
    return {name: tensor for name, tensor in tensors.items() if is_encoders(name)}


def summarise(names: Iterable[str]) -> str:
    """Names with their block numbers folded: "blocks.*.attn.rel_pos_h (12)"."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


def shape_text(tensor: Tensor) -> str:
    """Shape as "1x197x768"."""
    return "x".join(map(str, tensor.shape)) or "scalar"
