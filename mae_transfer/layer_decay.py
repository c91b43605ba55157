"""Layer-wise learning-rate decay: one rule for every host (BEiT; MAE Appendix A.1; ViTDet Section 3).

Layer ids: cls_token, register_tokens, pos_embed, patch_embed and mask_token 0; block i is i + 1; everything else
(norm, fc_norm, pyramid, heads) depth + 1. The learning rate of a parameter is scaled by rate^(depth + 1 − id).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from mae_transfer.errors import ConfigError

_TOKENS = ("cls_token", "register_tokens", "pos_embed", "mask_token", "encoder_mask_token")
_EMBEDDINGS = (*_TOKENS, "patch_embed")
# The encoder's own part of a parameter's name, behind whatever prefix a host or a wrapper (DDP's "module.", FSDP's
# "_fsdp_wrapped_module.", compile's "_orig_mod.") puts before it.
_ENCODER_PREFIX = r"(?:^|.*\b(?:net|backbone|encoder|vit|_orig_mod|module|_fsdp_wrapped_module)\.)"
_BLOCK = re.compile(_ENCODER_PREFIX + r"blocks\.(\d+)\.")
_EMBEDDING = re.compile(_ENCODER_PREFIX + rf"(?:{'|'.join(_EMBEDDINGS)})(?:\.|$)")


def layer_id(name: str, depth: int) -> int:
    """Layer of a parameter by its name, with or without a host's prefix.

    >>> [layer_id(name, 12) for name in ("backbone.net.pos_embed", "blocks.3.attn.qkv.weight", "roi_heads.mask.weight")]
    [0, 4, 13]

    Raises:
        ConfigError: a block that a model of ``depth`` blocks does not have.
    """
    block = _BLOCK.match(name)
    if block:
        index = int(block.group(1))
        if index >= depth:
            raise ConfigError(f"parameter {name} is of block {index}, but layer decay was set up for {depth} blocks")
        return index + 1
    return 0 if _EMBEDDING.match(name) else depth + 1


def layer_scale(name: str, *, depth: int, rate: float) -> float:
    """rate^(depth + 1 − layer id): the factor on the learning rate of parameter ``name``."""
    return rate ** (depth + 1 - layer_id(name, depth))


def freeze_blocks(model: nn.Module, *, depth: int, num_blocks: int) -> list[str]:
    """Stop training the embeddings and the first ``num_blocks`` blocks of the encoder in ``model``; 0 for nothing.

    A table that blocks share goes on being trained while one of them is.

    Returns:
        The names of what is frozen.

    Raises:
        ConfigError: the encoder has fewer blocks.
    """
    if not 0 <= num_blocks <= depth:
        raise ConfigError(f"cannot freeze {num_blocks} blocks: the encoder has {depth}; expected 0 to {depth}")
    if not num_blocks:
        return []
    named = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter) for name, parameter in named if layer_id(name, depth) > num_blocks}
    frozen = [(name, parameter) for name, parameter in named if id(parameter) not in trained]
    for _, parameter in frozen:
        parameter.requires_grad_(False)
    return [name for name, _ in frozen]


NoDecay = Callable[[str, Tensor], bool]


def no_decay_1d(name: str, parameter: Tensor) -> bool:
    """The MAE paper's rule: 1-D parameters (norms, biases, layer scale), pos_embed and the tokens are not decayed."""
    leaf = name.rsplit(".", 1)[-1]
    return parameter.ndim <= 1 or leaf in _TOKENS


def parameter_groups(
    named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    depth: int,
    rate: float = 1.0,
    lr: float,
    weight_decay: float,
    no_decay: NoDecay = no_decay_1d,
) -> list[dict[str, Any]]:
    """Optimizer groups with layer-wise learning rates.

    Args:
        named_parameters: a module, or (name, parameter) pairs. Frozen parameters are left out; a parameter shared
            under several names counts once, under the first.
        depth: blocks of the encoder.
        rate: layer decay; 1 for none.
        lr: learning rate of the last layer (heads).
        weight_decay: of the parameters that are decayed.
        no_decay: says of (name, parameter) whether its weight decay is 0.

    Returns:
        Groups ``{"params", "names", "lr", "lr_scale", "weight_decay", "layer_id"}``, from the embeddings to the heads.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"layer decay is {rate}; expected a rate above 0 and at most 1 (1 = no decay)")
    if isinstance(named_parameters, nn.Module):
        named_parameters = named_parameters.named_parameters()
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        layer = layer_id(name, depth)
        decay = 0.0 if no_decay(name, parameter) else weight_decay
        scale = layer_scale(name, depth=depth, rate=rate)
        group = groups.setdefault(
            (layer, decay),
            {"params": [], "names": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay, "layer_id": layer},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]
