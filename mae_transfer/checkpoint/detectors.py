"""Whole detectors: Detectron2's ViTDet releases (``.pkl``, ``.pth``) and detectors of this project, by one reader.

Names are those of ``mae_transfer.detection``'s models. ViTDet's differ in one place: its pyramid is part of the
backbone, here it is a module of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from mae_transfer.checkpoint.info import EncoderInfo, infer_info
from mae_transfer.checkpoint.load import (
    Report,
    describe,
    list_problems,
    load_backbone,
)
from mae_transfer.checkpoint.names import shape_text, summarise
from mae_transfer.checkpoint.read import read_tensors
from mae_transfer.checkpoint.resize import fit
from mae_transfer.errors import CheckpointError

if TYPE_CHECKING:
    from mae_transfer.vit import VisionTransformer

_ENCODER = "backbone.net."
_HEADS = ("proposal_generator.", "roi_heads.")
# Buffers that older files carry and that a model makes from its config.
_FROM_THE_CONFIG = re.compile(r"^pixel_(mean|std)$|anchor_generator\.cell_anchors\.")
# Layers with an output a category: trained for other categories they are of no use.
_BY_CATEGORY = re.compile(r"^roi_heads\.(box_predictor(\.\d+)?\.(cls_score|bbox_pred)|mask_head\.predictor)\.")


def is_detector(path: str | Path) -> bool:
    """Whether a checkpoint holds a whole detector; False for an encoder alone, or nothing that can be read.

    What is wrong with an unreadable file is said by whoever then reads it.
    """
    try:
        tensors, _ = read_tensors(path)
    except CheckpointError:
        return False
    return _is_whole(tensors)


def read_detector(path: str | Path) -> dict[str, Tensor]:
    """The weights of a whole detector, by the names of this project's models.

    Raises:
        CheckpointError: unreadable, unsafe, or no detector on a Vision Transformer.
    """
    return _read(path)[0]


def _read(path: str | Path) -> tuple[dict[str, Tensor], EncoderInfo]:
    tensors, metadata = read_tensors(path)
    if not _is_whole(tensors):
        raise CheckpointError(
            f"{path} holds no whole detector on a Vision Transformer: expected tensors below {_ENCODER} and "
            f"{', '.join(_HEADS)} as ViTDet's releases have them; found {summarise(list(tensors)[:5])} …"
        )
    tensors = {_our_name(name): tensor for name, tensor in tensors.items() if not _FROM_THE_CONFIG.search(name)}
    if metadata.get("family"):
        return tensors, EncoderInfo.from_metadata(metadata, str(path))
    encoder = {name.removeprefix(_ENCODER): tensor for name, tensor in tensors.items() if name.startswith(_ENCODER)}
    return tensors, infer_info(encoder, family="detectron2", source=str(path))


def describe_detector(detector: nn.Module) -> dict[str, str]:
    """Metadata for a detector's file: its encoder, and the mean and std of its input, which no other part records.

    Args:
        detector: as of ``load_detector``; its ``pixel_mean`` and ``pixel_std`` are on the scale 0 to 255.
    """
    statistics = {}
    for field, buffer in (("mean", "pixel_mean"), ("std", "pixel_std")):
        values = detector.get_buffer(buffer).double().flatten() / 255
        statistics[field] = tuple(round(value, 6) for value in values.tolist())
    vit = cast("VisionTransformer", detector.get_submodule(_ENCODER.rstrip(".")))
    return describe(vit, family="detectron2", **statistics).to_metadata()


def load_detector(detector: nn.Module, path: str | Path) -> Report:
    """Load a whole detector, strictly: every tensor is loaded or resized, or it is explained.

    Position tables are resized to the model's grid. The last layers of the heads keep their initial value where they
    were trained for another number of categories, and the report says so.

    Args:
        detector: with an ``MAEBackbone``, whose encoder is ``detector.backbone.net``.

    Raises:
        CheckpointError: unreadable; a missing, unexpected or misshapen tensor. The model is left untouched.
    """
    (tensors, info), own = _read(path), detector.state_dict()
    vit = cast("VisionTransformer", detector.get_submodule(_ENCODER.rstrip(".")))
    loaded: dict[str, Tensor] = {}
    resized: dict[str, str] = {}
    other_categories: list[str] = []
    mismatched: list[str] = []
    for name in tensors.keys() & own.keys():
        fitted = tensor = tensors[name]
        if name.startswith(_ENCODER):
            fitted = fit(name.removeprefix(_ENCODER), tensor, own[name], vit, info)
        if fitted.shape == own[name].shape:
            loaded[name] = fitted
            if fitted is not tensor:
                resized[name] = f"{shape_text(tensor)} -> {shape_text(fitted)}"
        elif _BY_CATEGORY.match(name):
            other_categories.append(name)
        else:
            mismatched.append(f"{name} is {shape_text(tensor)}, the model has {shape_text(own[name])}")
    problems = list_problems(
        [name for name in own if name not in tensors], [name for name in tensors if name not in own], mismatched
    )
    if problems:
        raise CheckpointError(
            f"{path} ({info.size} detector) does not fit the configured model: {'; '.join(problems)}. Use the config "
            "that it was trained with (size, pyramid, Mask or Cascade R-CNN, norms and heads must agree)"
        )
    detector.load_state_dict(loaded, strict=False)  # strictness was checked above, with reasons
    return Report(
        source=str(path),
        family="detectron2",
        loaded=[name for name in tensors if name in loaded and name not in resized],
        resized=resized,
        missing=[],
        unexpected=[],
        other_categories=sorted(other_categories),
        info=info,
    )


def load_initial(detector: nn.Module, path: str | Path) -> str:
    """Start a detector from whatever ``path`` holds: a whole detector, or an encoder of any family, strictly.

    Returns:
        What was loaded, for the log.

    Raises:
        CheckpointError: unreadable, or of another model.
    """
    if is_detector(path):
        return f"The whole detector from {load_detector(detector, path)}"
    vit = cast("VisionTransformer", detector.get_submodule(_ENCODER.rstrip(".")))
    return f"Encoder from {load_backbone(vit, path)}"


def _is_whole(tensors: dict[str, Tensor]) -> bool:
    return all(any(name.startswith(part) for name in map(_our_name, tensors)) for part in (_ENCODER, *_HEADS))


def _our_name(name: str) -> str:
    name = name.removeprefix("module.")
    return re.sub(r"^backbone\.(simfp_\d+\.)", r"backbone.pyramid.\1", name)
