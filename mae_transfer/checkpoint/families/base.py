"""What a family of checkpoints is: how its files are told from others, and how its tensors get our names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_transfer.checkpoint.info import IMAGENET_MEAN, IMAGENET_STD
from mae_transfer.errors import CheckpointError

Tensors = dict[str, Tensor]
HALF = (0.5, 0.5, 0.5)  # mean and deviation of models that are fed values from -1 to 1


@dataclass(frozen=True, kw_only=True)
class Raw:
    """What a file holds, before anybody knows whose it is.

    Attributes:
        tensors: by the file's names, without the prefix that the encoder stands below.
        prefix: that prefix.
        outside: what does not stand below it, by its whole name.
        config: of the ``config.json`` beside it (Hugging Face); empty without one.
    """

    path: Path
    tensors: Tensors
    prefix: str = ""
    outside: Tensors = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """An encoder in our names.

    Attributes:
        tensors: decoder and head included where the family has them.
        fields: of ``EncoderInfo``, as far as the family says more than the tensors' shapes.
        left_out: names of the file's that have no place here.
    """

    tensors: Tensors
    fields: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of checkpoints.

    Attributes:
        name: what ``Checkpoint.family`` says.
        title: for people.
        anchor: the name of the patch projection, which finds the prefix.
        marks: patterns, each of which some name matches.
        without: patterns that no name matches.
        license: of the published weights, as the Hub spells it; empty where it differs from file to file.
        model_types: what Hugging Face's ``config.json`` calls the models that the licence is of.
    """

    name: str
    title: str
    anchor: str
    convert: Callable[[Raw], Converted]
    marks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    license: str = ""
    model_types: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def license_beside(self, config: Mapping[str, Any]) -> str:
        """The licence, unless ``config.json`` is of another model in these names: timm's, which says its own, or
        another of Hugging Face's."""
        other = bool(self.model_types) and config.get("model_type", self.model_types[0]) not in self.model_types
        return "" if other or "pretrained_cfg" in config else self.license

    def share(self, names: Iterable[str]) -> float:
        """How many of what the family is known by is there, from 0 to 1."""
        names = list(names)
        found = [any(re.search(mark, name) for name in names) for mark in (_literal(self.anchor), *self.marks)]
        return sum(found) / len(found)

    def absent(self, candidates: Iterable[Iterable[str]]) -> list[str]:
        """Of what the family is known by, what the best of several lists of names lacks."""
        lists = [list(names) for names in candidates]
        best = max(lists, key=self.share)
        marks = [mark for mark in self.marks if not any(re.search(mark, name) for name in best)]
        anchor = [] if any(re.search(_literal(self.anchor), name) for name in best) else [self.anchor]
        return anchor + [_as_name(mark) for mark in marks]

    def fits(self, names: Iterable[str]) -> bool:
        """Names of a file, without the prefix where they have it."""
        names = list(names)
        return self.share(names) == 1 and not any(re.search(mark, name) for mark in self.without for name in names)


def _literal(name: str) -> str:
    return rf"(^|\.){re.escape(name)}$"


def _as_name(pattern: str) -> str:
    """A mark as people read it: "blocks.0.attn.qkv.weight"."""
    without_optional = re.sub(r"\([^()]*\)\?", "", pattern)
    return without_optional.replace("\\", "").strip("^$").replace("(", "").replace(")", "").replace("|", " or ")


def rename(tensors: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> tuple[Tensors, list[str]]:
    """Tensors whose whole name matches a pattern, by the name that its replacement gives; and the names of the others.

    An empty replacement leaves a tensor out on purpose.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    result, rest = {}, []
    for name, tensor in tensors.items():
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(name):
                if replacement:
                    result[match.expand(replacement)] = tensor
                break
        else:
            rest.append(name)
    return result, rest


def join_qkv(tensors: Tensors, prefix: str, path: Path) -> Tensors:
    """Queries, keys and values that are three layers, ``{prefix}q.weight`` …, as our one ``qkv``; a bias that one of
    them has in no block is zero.

    Args:
        tensors: with names such as ``blocks.0.attn.q.weight``: taken out, and ``blocks.0.attn.qkv.weight`` put in.
        prefix: pattern of what stands before ``q.weight``.

    Raises:
        CheckpointError: one of the three weights is missing or of another shape, or a bias that other blocks have.
    """
    result = {
        name: tensor for name, tensor in tensors.items() if not re.fullmatch(rf"{prefix}[qkv]\.(weight|bias)", name)
    }
    attentions = sorted({match[1] for name in tensors if (match := re.fullmatch(rf"({prefix})[qkv]\.weight", name))})
    for attention in attentions:
        weights = [tensors.get(f"{attention}{part}.weight") for part in "qkv"]
        shapes = {None if weight is None else tuple(weight.shape) for weight in weights}
        if None in shapes or len(shapes) > 1:
            raise CheckpointError(
                f"{path}: queries, keys and values of {attention.rstrip('.')} should be three weights of one shape; "
                f"found {', '.join('none' if shape is None else str(shape) for shape in shapes)}"
            )
        known = [weight for weight in weights if weight is not None]
        result[f"{attention}qkv.weight"] = torch.cat(known)
        biases = [tensors.get(f"{attention}{part}.bias") for part in "qkv"]
        for part, bias in zip("qkv", biases):
            if bias is None and any(re.fullmatch(rf"{prefix}{part}\.bias", name) for name in tensors):
                raise CheckpointError(
                    f"{path}: the bias of {attention}{part} is missing, which other blocks have; the file is "
                    "damaged or incomplete"
                )
            if bias is not None and bias.shape != known[0].shape[:1]:
                raise CheckpointError(
                    f"{path}: the bias of {attention}{part} is {tuple(bias.shape)}, expected "
                    f"{tuple(known[0].shape[:1])}; the file is damaged or incomplete"
                )
        result[f"{attention}qkv.bias"] = torch.cat(
            [weight.new_zeros(weight.shape[0]) if bias is None else bias for bias, weight in zip(biases, known)]
        )
    return result


def join_biases(tensors: Tensors, path: Path) -> None:
    """``q_bias`` and ``v_bias`` of every attention as the bias of its ``qkv``, zeros between them, in place."""
    for name in [name for name in tensors if name.endswith(".q_bias")]:
        attention = name.removesuffix("q_bias")
        query, value = tensors.pop(name), need(tensors, f"{attention}v_bias", path)
        del tensors[f"{attention}v_bias"]
        tensors[f"{attention}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])


def with_cls_row(pos_embed: Tensor) -> Tensor:
    """A table of patches alone (1, L, D), with the row of zeros that ours has first: (1, 1 + L, D)."""
    return torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], dim=1)


def square_side(count: int, what: str, path: Path) -> int:
    """The root of ``count``.

    Raises:
        CheckpointError: it is no square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(f"{path}: {what} is {count}, which is no square grid; the file is damaged or incomplete")
    return side


def need(tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """Raises CheckpointError where a tensor is missing."""
    if name not in tensors:
        raise CheckpointError(f"{path}: {name} is missing; the file is damaged or incomplete")
    return tensors[name]


def register_tokens(tensors: Tensors, path: Path) -> Tensor | None:
    """(1, R, D), or None where there are none: an empty tensor of them is taken out.

    Raises:
        CheckpointError: another shape.
    """
    registers = tensors.get("register_tokens")
    if registers is not None and (registers.ndim != 3 or len(registers) != 1):
        raise CheckpointError(
            f"{path}: register or distillation tokens are {tuple(registers.shape)}, expected (1, count, width); the "
            "file is damaged"
        )
    if registers is not None and not registers.shape[1]:
        del tensors["register_tokens"]
        return None
    return registers


def split_distillation(tensors: Tensors, path: Path) -> None:
    """DeiT's distillation token as a register, in place: its position, the second row of the table, is added to it.

    The two are constants, and no other place has both.

    Raises:
        CheckpointError: the table has no two rows besides a square of patches.
    """
    table, token = need(tensors, "pos_embed", path), register_tokens(tensors, path)
    if token is None or token.shape[1] != 1 or table.ndim != 3:
        raise CheckpointError(f"{path}: a distillation token and pos_embed do not go together; the file is damaged")
    square_side(table.shape[1] - 2, "the number of patch positions", path)
    tensors["register_tokens"] = token + table[:, 1:2]
    tensors["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)


def ffn_of(tensors: Mapping[str, Tensor], path: Path) -> str:
    """What ``VisionTransformer`` calls the feed-forward part, whose gated first layer is twice as wide as its second.

    Raises:
        CheckpointError: one of the two is missing or no matrix.
    """
    first, second = (need(tensors, f"blocks.0.mlp.{name}.weight", path) for name in ("fc1", "fc2"))
    for name, weight in (("fc1", first), ("fc2", second)):
        if weight.ndim != 2:
            raise CheckpointError(
                f"{path}: blocks.0.mlp.{name}.weight is {tuple(weight.shape)}, expected a matrix; the file is damaged"
            )
    return "swiglu" if first.shape[0] == 2 * second.shape[1] else "mlp"


def has_norm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there is a last norm: half of one counts, and is then found incomplete."""
    return "norm.weight" in tensors or "norm.bias" in tensors


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError where a value that is read of Hugging Face's JSON files is not of its kind."""
    for keys, fits, expected in _KINDS:
        for key in keys:
            if key in config and not fits(config[key]):
                raise CheckpointError(
                    f"{path} says {key}: {json.dumps(config[key])}; expected {expected}. Fetch it again, or correct it"
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_size(value: object) -> bool:
    pair = value if isinstance(value, list) else [value, value]
    return value is None or (len(pair) == 2 and all(map(_is_count, pair)))


def _is_statistic(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


_KINDS: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (("num_attention_heads", "decoder_num_attention_heads"), _is_count, "a whole number above zero"),
    (("layer_norm_eps", "rope_theta"), _is_positive, "a number above zero"),
    (("image_size",), _is_size, "a whole number of pixels, or [height, width]"),
    (("image_mean", "image_std"), _is_statistic, "a list of one number a channel"),
)


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """``EncoderInfo`` fields that Hugging Face's ``config.json`` gives, whatever the model."""
    fields: dict[str, Any] = {}
    for key, name in (("num_attention_heads", "num_heads"), ("layer_norm_eps", "norm_eps")):
        if key in config:
            fields[name] = config[key]
    size = config.get("image_size")
    if size is not None:
        fields["image_size"] = tuple(size) if isinstance(size, list | tuple) else (size, size)
    for key, name in (("image_mean", "mean"), ("image_std", "std")):  # of preprocessor_config.json
        if key in config:
            fields[name] = tuple(config[key])
    return fields
