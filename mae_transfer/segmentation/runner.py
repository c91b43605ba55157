"""MMEngine's Runner with checkpoints that are whole or not there, and weights read without running pickles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from numpy._core import multiarray
from torch import Tensor, nn

from mae_transfer.checkpoint.files import read_torch
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import CheckpointError


class SegmentationRunner(Runner):
    """Runner whose checkpoints are written under a temporary name and renamed, and read as plain data."""

    _resume: bool  # set by Runner
    _load_from: str | None
    stop_request: StopRequest | None = None  # read by the hook SaveOnSignal

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """As Runner's; a run killed while saving leaves the checkpoint of before as it was."""
        temporary = f".{filename}.tmp"
        super().save_checkpoint(out_dir, temporary, *args, **kwargs)
        (Path(out_dir) / temporary).replace(Path(out_dir) / filename)

    def load_or_resume(self) -> None:
        """As Runner's, but continues from the last checkpoint *in the work dir*, wherever that has been moved to."""
        if self._resume and not self._load_from:
            found = checkpoints_of(self.work_dir)
            if found:
                self._load_from = str(found[-1])
            else:
                self.logger.info(f"{self.work_dir} holds no checkpoint yet: starting from the beginning")
                self._resume = False
        super().load_or_resume()

    def load_checkpoint(self, filename: str, *_: Any, **__: Any) -> dict[str, Any]:
        """Weights into the model, strictly; returns the whole checkpoint, for ``resume``. Read on the CPU, safely."""
        checkpoint = read_checkpoint(filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        fill(self.model.module if is_model_wrapper(self.model) else self.model, checkpoint["state_dict"], filename)
        return checkpoint


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoints ``iter_N.pth`` in a work dir, the last one last."""
    return sorted(Path(folder).glob("iter_*.pth"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a segmentation checkpoint's weights into a whole model, strictly.

    Raises:
        CheckpointError: the file is missing, unsafe or damaged, or of another model.
    """
    fill(model, read_weights(path), path)


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """``load_weights`` of a state dict already read from ``path``."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    differing = [
        f"{name} {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{label} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for label, names in (("lacks", missing), ("also holds", unexpected), ("shapes differ:", differing))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} is not of this model: {'; '.join(problems)}. Give the config and the dataset.* options it was "
            "trained with (its work dir holds them as a .py file)"
        )
    model.load_state_dict(state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """``state_dict`` of a checkpoint that MMEngine wrote; raises as ``read_checkpoint``."""
    return read_checkpoint(path)["state_dict"]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """All of a checkpoint that MMEngine wrote.

    Raises:
        CheckpointError: missing, damaged, or holding objects other than tensors, arrays and MMEngine's histories.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    with torch.serialization.safe_globals(_safe_globals()):
        content = read_torch(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict; expected a checkpoint that train_seg wrote")
    return content


def _safe_globals() -> list[Any]:
    """What MMEngine's log histories are made of. They name their own methods through ``getattr``, so a stand-in is
    allowed under that name which gives out nothing else."""
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.uint32, np.bool_)]
    methods = (history_method, "builtins.getattr")
    return [methods, HistoryBuffer, np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *kinds]


def history_method(owner: Any, name: str) -> Any:
    """A statistic of MMEngine's HistoryBuffer by its name, and nothing else.

    Raises:
        UnpicklingError: asked for anything else.
    """
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"the file asks for {name} of {owner}")
    return getattr(HistoryBuffer, name)
