"""What a checkpoint says of its encoder, carried in the file's metadata so that hosts need not be told twice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mae_transfer.errors import CheckpointError
from mae_transfer.sizes import SIZES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
            if field.type == "str":
                values[field.name] = text
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise CheckpointError(f"{source}: metadata {field.name} is {text!r}, which is no JSON value") from error
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


def infer_info(tensors: Mapping[str, Tensor], *, family: str, source: str) -> EncoderInfo:
    """Read the architecture off the tensors of a file that carries no metadata, in our key names.

    Heads cannot be read off; they follow from the width (64 wide a head, 80 for huge). The image is taken to be
    square, and the normalisation to be ImageNet's, as for every published MAE.

    Raises:
        CheckpointError: no encoder in our key names, or a position table that is no square grid.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
    absent = [key for key in needed if key not in tensors]
    if absent:
        raise CheckpointError(
            f"{source} holds no Vision Transformer that is known here: {', '.join(absent)} not found among its "
            f"{len(tensors)} tensors (first: {', '.join(list(tensors)[:5]) or 'none'})"
        )
    width, channels, p_h, p_w = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    num_patches = tensors["pos_embed"].shape[1] - 1
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise CheckpointError(
            f"{source}: pos_embed has {num_patches} patch rows, which is no square grid, and the file has no metadata "
            "that gives its height and width. Convert it with the tool that wrote it, or from our .safetensors"
        )
    num_heads = {size.width: size.num_heads for size in SIZES.values()}.get(width, max(1, width // 64))
    return EncoderInfo(
        family=family,
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=(p_h, p_w),
        image_size=(side * p_h, side * p_w),
        channels=channels,
        mean=IMAGENET_MEAN if channels == 3 else (0.0,) * channels,
        std=IMAGENET_STD if channels == 3 else (1.0,) * channels,
    )
