"""Strict loading of an encoder: everything is loaded, resized, or explained; anything else raises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_transfer.checkpoint.build import vit_arguments
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.checkpoint.names import is_encoders, shape_text, summarise
from mae_transfer.checkpoint.read import Checkpoint, read_checkpoint
from mae_transfer.checkpoint.resize import fit
from mae_transfer.errors import CheckpointError
from mae_transfer.vit import VisionTransformer

# Parameters that transfer adds and no pretraining has: they keep their initial value.
_NEW_IN_TRANSFER = re.compile(
    r"(.*\.)?(rel_pos_[hw]|relative_position_bias_table|ls[12]\.gamma)$|^(fc_norm|head|head_norm)\."
)
# What a host may have been built without; relative positions come and go with the host (ViTDet, Li et al.).
_OPTIONAL_IN_HOST = re.compile(r"^(cls_token$|norm\.|fc_norm\.|.*\.rel_pos_[hw]$|.*relative_position_bias_table$)")
_NORM_EPS_MATTERS = 5e-6  # Hugging Face's ViTMAE says 1e-12 of what was trained with 1e-6: both are next to none
_LAYER_SCALE = re.compile(r".*\.ls[12]\.gamma$")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a load did, name by name.

    Attributes:
        loaded: tensors taken as they are.
        resized: tensors that were resized, with the two shapes.
        missing: parameters of the model that the file does not have and that keep their initial value.
        unexpected: tensors of the file that the model has no place for.
        other_categories: of a whole detector, layers that were trained for another number of categories and keep
            their initial value.
        info: architecture and input convention of the file.
    """

    source: str
    family: str
    loaded: list[str]
    resized: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    info: EncoderInfo = field(repr=False)
    other_categories: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        patch, image = "x".join(map(str, self.info.patch_size)), "x".join(map(str, self.info.image_size))
        lines = [
            f"{self.source} ({self.family}, {self.info.size}, patch {patch}, {image} px)",
            f"  loaded      {len(self.loaded)} tensors",
        ]
        if self.resized:
            lines.append("  resized     " + ", ".join(f"{name} {shapes}" for name, shapes in self.resized.items()))
        if self.missing:
            lines.append(f"  missing     {summarise(self.missing)}: new in transfer, initial value kept")
        if self.other_categories:
            lines.append(f"  kept        {summarise(self.other_categories)}: of other categories, initial value kept")
        if self.unexpected:
            lines.append(f"  unexpected  {summarise(self.unexpected)}: no place in this model, left out")
        if self.info.license:
            lines.append(f"  licence     {self.info.license}: of these weights, and of what is trained from them")
        return "\n".join(lines)


def load_backbone(vit: VisionTransformer, path: str | Path, *, patch_resize: str | None = None) -> Report:
    """Load an encoder from any supported checkpoint, strictly.

    Position embeddings (absolute and relative) are resized to the model's grid. Explained, hence allowed: missing
    relative position, layer scale, fc_norm and heads; unused decoder, mask token and classification head;
    cls_token, norms or relative positions where the model has none; a layer scale of one.

    Args:
        path: a file, a folder, "hf://owner/name[@revision][/file]" or "timm/name".
        patch_resize: "pinv" or "bicubic" takes the projection to the model's patch, whatever it is (see
            ``resize_projection``). None does so only where ViTDet did, bicubically from 14 to 16 pixels.

    Raises:
        CheckpointError: unreadable or unknown file; any other missing or unexpected tensor; a shape that differs.
            The model is left untouched.
    """
    return load_checkpoint(vit, read_checkpoint(path), patch_resize=patch_resize)


def build_backbone(path: str | Path, *, patch_resize: str | None = None, **overrides: Any) -> VisionTransformer:
    """The encoder of any supported checkpoint, of the architecture that the file is of, with its weights.

    Args:
        path: as ``load_backbone`` takes it.
        patch_resize: for another ``patch_size`` than the file's: "pinv" or "bicubic", as ``load_backbone`` takes it.
        overrides: arguments of ``VisionTransformer`` in place of the checkpoint's: another ``image_size`` resizes
            positions, ``drop_path`` trains with it, ``cls_token=False`` or ``final_norm=False`` leave theirs out.

    Raises:
        CheckpointError: as ``load_backbone``.
    """
    checkpoint = read_checkpoint(path)
    vit = VisionTransformer(**{**vit_arguments(checkpoint.info), **overrides})
    load_checkpoint(vit, checkpoint, patch_resize=patch_resize)
    return vit


def load_checkpoint(vit: VisionTransformer, checkpoint: Checkpoint, *, patch_resize: str | None = None) -> Report:
    """``load_backbone`` of a checkpoint already in memory."""
    own = vit.state_dict()
    loaded: dict[str, Tensor] = {}
    resized: dict[str, str] = {}
    unexpected: list[str] = []
    mismatched: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        if name not in own:
            unexpected.append(name)
            continue
        fitted = fit(name, tensor, own[name], vit, checkpoint.info, patch_resize=patch_resize)
        if fitted.shape != own[name].shape:
            mismatched.append(f"{name} is {shape_text(tensor)}, the model has {shape_text(own[name])}")
        elif fitted is not tensor:
            resized[name] = f"{shape_text(tensor)} -> {shape_text(fitted)}"
        loaded[name] = fitted
    missing = [name for name in own if name not in checkpoint.tensors]
    problems = list_problems(
        [name for name in missing if not _NEW_IN_TRANSFER.match(name)],
        [name for name in unexpected if not _is_dispensable(name, checkpoint.tensors[name])],
        mismatched,
    )
    problems += _other_computation(vit, checkpoint)
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} ({checkpoint.family}, {checkpoint.info.size}) does not fit this "
            f"{vit.width}-wide, {vit.depth}-block model with {vit.patch_size[0]}x{vit.patch_size[1]} patches: "
            + "; ".join(problems)
            + ". Build the model with the size and patch of the checkpoint (convert_checkpoint.py --inspect shows them)"
        )
    refuse_broken({name: tensor for name, tensor in loaded.items() if not own[name].is_meta}, checkpoint.path)
    vit.load_state_dict(loaded, strict=False)  # strictness was checked above, with reasons
    return Report(
        source=str(checkpoint.path),
        family=checkpoint.family,
        loaded=[name for name in loaded if name not in resized],
        resized=resized,
        missing=missing,
        unexpected=unexpected,
        info=checkpoint.info,
    )


def _other_computation(vit: VisionTransformer, checkpoint: Checkpoint) -> list[str]:
    """What shapes do not show and yet makes other features of the same weights, each as part of a sentence."""
    info, problems = checkpoint.info, []
    if "num_heads" in checkpoint.certain and vit.num_heads != info.num_heads:
        problems.append(f"the file's attention has {info.num_heads} heads, the model's {vit.num_heads}")
    if "norm_eps" in checkpoint.certain and abs(vit.norm_eps - info.norm_eps) > _NORM_EPS_MATTERS:
        problems.append(f"the file's norms have an epsilon of {info.norm_eps:g}, the model's {vit.norm_eps:g}")
    if vit.rope_base != info.rope_base:
        has = {True: "rotary positions of base {}", False: "no rotary positions"}
        ours, files = (has[base is not None].format(base) for base in (vit.rope_base, info.rope_base))
        problems.append(f"the file has {files}, the model {ours}")
    return problems


def refuse_broken(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError where weights are not finite, or whole numbers, which counts of a batch norm alone are."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
    kinds: dict[str, list[str]] = {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            kinds.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(name)
    problems = [f"{summarise(names)} hold {kind}, expected floating point" for kind, names in kinds.items()]
    if infinite := [name for name, tensor in weights.items() if not _is_finite(tensor)]:
        problems.append(f"{summarise(infinite)} hold values that are no finite numbers")
    if problems:
        raise CheckpointError(
            f"{path}: {'; '.join(problems)}. The file is of a training that diverged, or damaged, or of weights that "
            "were quantised; give an earlier checkpoint, or the original weights"
        )


def _is_finite(tensor: Tensor) -> bool:
    numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # few operations know 8-bit kinds
    return bool(torch.isfinite(numbers).all())


def _is_dispensable(name: str, tensor: Tensor) -> bool:
    """Whether a model may go without this tensor of a file's: a layer scale other than one is part of every block."""
    if _LAYER_SCALE.match(name):
        return bool((tensor == 1).all())
    return bool(not is_encoders(name) or _OPTIONAL_IN_HOST.match(name))


def list_problems(lacking: list[str], foreign: list[str], mismatched: list[str]) -> list[str]:
    """What keeps a file from fitting a model, each as part of a sentence; empty where nothing does."""
    problems = []
    if lacking:
        problems.append(f"the file lacks {summarise(lacking)}")
    if foreign:
        problems.append(f"the model has no place for {summarise(foreign)}")
    if mismatched:
        shown = ", ".join(mismatched[:3]) + (f" and {len(mismatched) - 3} more" if len(mismatched) > 3 else "")
        problems.append(f"shapes differ: {shown}")
    return problems


def image_statistics(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (channels in RGB order, values 0 to 1) that the encoder at ``path`` was trained with.

    From the file's metadata; ImageNet's for the published families, which carry none.
    """
    info = read_checkpoint(path).info
    return info.mean, info.std


def describe(vit: VisionTransformer, **fields: object) -> EncoderInfo:
    """``EncoderInfo`` of a model in memory; ``fields`` give what the model does not know (mean, std, git_commit …)."""
    values: dict[str, object] = {
        "family": "mae-transfer",
        "width": vit.width,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "patch_size": vit.patch_size,
        "image_size": vit.image_size,
        "channels": vit.num_channels,
        "mlp_ratio": vit.mlp_ratio,
        "ffn": vit.ffn,
        "norm_eps": vit.norm_eps,
        "cls_token": vit.cls_token is not None,
        "num_registers": vit.num_prefix_tokens - (vit.cls_token is not None),
        "absolute_positions": vit.pos_embed is not None,
        "rope_base": vit.rope_base,
        "final_norm": not isinstance(vit.norm, nn.Identity),
        "pooled_norm": hasattr(vit, "fc_norm") and not isinstance(vit.fc_norm, nn.Identity),
        "layer_scale": not isinstance(vit.blocks[0].ls1, nn.Identity),
        "window_size": vit.window_size,
        "global_blocks": vit.global_blocks,
        "relative_position": vit.relative_position,
        "attention_image_size": None if vit.relative_position is None else vit.attention_image_size,
    }
    return EncoderInfo(**{**values, **fields})  # type: ignore[arg-type]  # fields are checked by the dataclass
