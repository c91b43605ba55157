"""Formats that an encoder is written in, each with its inverse: converting there and back gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mae_transfer.checkpoint.formats import huggingface, timm
from mae_transfer.checkpoint.formats.base import Exported, Format, Tensors
from mae_transfer.checkpoint.formats.huggingface import HF
from mae_transfer.checkpoint.formats.plain import BACKBONE, DETECTRON2, MAE, MMSEG
from mae_transfer.checkpoint.formats.timm import TIMM
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.errors import CheckpointError

FORMATS: dict[str, Format] = {format.name: format for format in (BACKBONE, MAE, TIMM, HF, DETECTRON2, MMSEG)}

# What our metadata calls names other than ours, and what gives ours back.
_RESTORE: dict[str, Callable[[Tensors, EncoderInfo], Tensors]] = {"hf": huggingface.restore, "timm": timm.restore}


def restore(tensors: Tensors, info: EncoderInfo, names: str, path: Path) -> Tensors:
    """Tensors of a file that was written here, in our names again: the bits that were exported.

    Args:
        names: ``Exported.names``, as the file's metadata has it.

    Raises:
        CheckpointError: names that are not known, or tensors that are not those.
    """
    if names not in _RESTORE:
        raise CheckpointError(f"{path} has names of {names!r}; this version knows {', '.join(_RESTORE)}")
    try:
        return _RESTORE[names](tensors, info)
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{path}, written here in the names of {names}: {error}") from error


__all__ = ["FORMATS", "Exported", "Format", "restore"]
