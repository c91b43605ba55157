"""What a checkpoint says of its encoder, carried in the file's metadata so that hosts need not be told twice."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mae_transfer.errors import CheckpointError
from mae_transfer.position import sincos_2d
from mae_transfer.sizes import SIZES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# By width, which is all that a file shows: our sizes, and published ones whose heads are not 64 wide (SO400M, g, G).
_HEADS = {size.width: size.num_heads for size in SIZES.values()} | {1152: 16, 1408: 16, 1664: 16}


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """Architecture and input convention of an encoder.

    Attributes:
        family: where the weights come from: "mae-transfer" (ours), "mae" (official), …
        size: name of the size ("tiny" … "huge"), or "custom".
        patch_size, image_size: (height, width) in pixels.
        mean, std: of the RGB input, for values between 0 and 1.
        normalised_target: pretrained on per-patch normalised pixels; None where unknown.
        positions: "sincos" where the position table is the fixed one, "learned" where it was trained.
        cross_prediction_ratio: of a CrossMAE decoder: the share of all patches that it was trained to predict.
        git_commit: of the code that wrote the file; empty where unknown.
        mlp_ratio, ffn, norm_eps, cls_token, num_registers, absolute_positions, rope_base, final_norm, layer_scale,
            window_size, global_blocks, relative_position: what ``VisionTransformer`` is built with to hold it;
            ``layer_scale`` says whether there is one.
        pooled_norm: a norm of the averaged patch tokens (``fc_norm``) stands after the last block, as fine-tuning
            leaves it.
        attention_image_size: (height, width) whose grid the relative tables of global blocks span; None for
            ``image_size``.
        source: what the weights were read from: a file's name, or ``owner/name`` on a hub; empty where unknown.
        license: of the weights, as the Hub spells it ("cc-by-nc-4.0"); empty where unknown.
    """

    family: str
    width: int
    depth: int
    num_heads: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    normalised_target: bool | None = None
    decoder_num_heads: int | None = None
    positions: str = "sincos"
    cross_prediction_ratio: float | None = None
    git_commit: str = ""
    mlp_ratio: float = 4.0
    ffn: str = "mlp"
    norm_eps: float = 1e-6
    cls_token: bool = True
    num_registers: int = 0
    absolute_positions: bool = True
    rope_base: float | None = None
    final_norm: bool = True
    pooled_norm: bool = False
    layer_scale: bool = False
    window_size: int = 0
    global_blocks: tuple[int, ...] = ()
    relative_position: str | None = None
    attention_image_size: tuple[int, int] | None = None
    source: str = ""
    license: str = ""

    @property
    def size(self) -> str:
        """The named size of this width and depth, or "custom"."""
        for size in SIZES.values():
            if (size.width, size.depth, size.num_heads) == (self.width, self.depth, self.num_heads):
                return size.name
        return "custom"

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches of ``pos_embed``."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    def to_metadata(self) -> dict[str, str]:
        """As safetensors metadata: every value as JSON text, so that it reads back as what it was."""
        values = {**dataclasses.asdict(self), "size": self.size, "format": "pt"}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: str) -> EncoderInfo:
        """The inverse of ``to_metadata``.

        Raises:
            CheckpointError: a field is missing or unreadable.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in metadata:
                if field.default is dataclasses.MISSING:
                    raise CheckpointError(
                        f"{source}: metadata lacks {field.name}; the file was not written by this project"
                    )
                continue
            text = metadata[field.name]
            if field.type == "str" or (field.type == "str | None" and text != "null"):
                values[field.name] = text
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise CheckpointError(f"{source}: metadata {field.name} is {text!r}, which is no JSON value") from error
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


def infer_info(
    tensors: Mapping[str, Tensor], *, family: str, source: str, fields: Mapping[str, Any] | None = None
) -> EncoderInfo:
    """Read the architecture off the tensors of a file that carries no metadata, in our key names.

    Heads are read off tables of relative positions; without, they follow from the width (64 wide a head but for
    published sizes such as huge, 80).
    The image is taken to be square, and the normalisation to be ImageNet's, as for every published MAE.

    Args:
        fields: what is known of the family, or of a config beside the file; it wins.

    Raises:
        CheckpointError: no encoder in our key names, or a position table that is no square grid or of another width.
    """
    known = dict(fields or {})
    needed = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight"]
    if known.get("absolute_positions", True):
        needed.append("pos_embed")
    absent = [key for key in needed if key not in tensors]
    if absent:
        raise CheckpointError(
            f"{source} holds no Vision Transformer that is known here: {', '.join(absent)} not found among its "
            f"{len(tensors)} tensors (first: {', '.join(list(tensors)[:5]) or 'none'})"
        )
    for key, axes in (("patch_embed.proj.weight", 4), ("blocks.0.mlp.fc2.weight", 2), ("pos_embed", 3)):
        if key in tensors and (tensors[key].ndim != axes or not tensors[key].numel()):
            raise CheckpointError(
                f"{source}: {key} is {tuple(tensors[key].shape)}, expected {axes} axes, none empty; the file is "
                "damaged, or of a model that is not known here"
            )
    width, channels, p_h, p_w = tensors["patch_embed.proj.weight"].shape
    if "pos_embed" in tensors and tensors["pos_embed"].shape[2] != width:
        raise CheckpointError(
            f"{source}: pos_embed is {tuple(tensors['pos_embed'].shape)}, expected {width} channels as the patch "
            "projection has; the file is damaged"
        )
    if "image_size" not in known or "pos_embed" in tensors:
        known["image_size"] = _image_size(tensors["pos_embed"], (p_h, p_w), known.get("image_size"), source)
    grid = known["image_size"][0] // p_h, known["image_size"][1] // p_w
    read_off: dict[str, Any] = {
        "width": width,
        "depth": 1 + max(int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))),
        "num_heads": _num_heads(tensors, width),
        "patch_size": (p_h, p_w),
        "channels": channels,
        "mlp_ratio": tensors["blocks.0.mlp.fc2.weight"].shape[1] / width,
        "cls_token": "cls_token" in tensors,
        "final_norm": "norm.weight" in tensors or "norm.bias" in tensors,
        "pooled_norm": "fc_norm.weight" in tensors,
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        **_relative_position(tensors, grid),
    }
    if "pos_embed" in tensors:
        fixed = width % 4 == 0 and torch.allclose(tensors["pos_embed"].float(), sincos_2d(width, grid), atol=1e-4)
        read_off["positions"] = "sincos" if fixed else "learned"
    if channels != 3:
        known |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return EncoderInfo(**{**read_off, **known, "family": family})


def _num_heads(tensors: Mapping[str, Tensor], width: int) -> int:
    decomposed, biases = (
        tensors.get(f"blocks.0.attn.{name}") for name in ("rel_pos_h", "relative_position_bias_table")
    )
    if decomposed is not None and decomposed.ndim == 2 and decomposed.shape[1]:
        return max(1, width // decomposed.shape[1])  # a column for each channel of a head
    if biases is not None and biases.ndim == 2:
        return max(1, biases.shape[1])
    return _HEADS.get(width, max(1, width // 64))


def _image_size(table: Tensor, patch: tuple[int, int], said: tuple[int, int] | None, source: str) -> tuple[int, int]:
    """Pixels that a table of a cls row and patch rows is for: as said, where that fits, or a square."""
    num_patches = table.shape[1] - 1
    if said is not None and (said[0] // patch[0]) * (said[1] // patch[1]) == num_patches:
        return said[0] // patch[0] * patch[0], said[1] // patch[1] * patch[1]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise CheckpointError(
            f"{source}: pos_embed has {num_patches} patch rows, which is no square grid, and the file has no metadata "
            "that gives its height and width. Convert it with the tool that wrote it, or from our .safetensors"
        )
    return side * patch[0], side * patch[1]


def _relative_position(tensors: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Any]:
    """Kind of relative position and, of decomposed tables of two lengths, the windows and the blocks without any."""
    if any(name.endswith("relative_position_bias_table") for name in tensors):
        return {"relative_position": "bias"}
    rows = {int(name.split(".")[1]): len(table) for name, table in tensors.items() if name.endswith("attn.rel_pos_h")}
    if not rows:
        return {}
    longest, shortest = max(rows.values()), min(rows.values())
    found: dict[str, Any] = {"relative_position": "decomposed"}
    if longest != 2 * grid[0] - 1:  # of the size that a detector was trained at, its positions of another
        columns = max(len(table) for name, table in tensors.items() if name.endswith("attn.rel_pos_w"))
        patch = tensors["patch_embed.proj.weight"].shape[2:]
        found["attention_image_size"] = ((longest + 1) // 2 * patch[0], (columns + 1) // 2 * patch[1])
    if shortest < longest:
        whole = tuple(block for block in sorted(rows) if rows[block] == longest)
        found |= {"window_size": (shortest + 1) // 2, "global_blocks": whole}
    return found
