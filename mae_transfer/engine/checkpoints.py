"""Training states on disk: written whole or not at all, the newest few kept, read without running pickled code."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mae_transfer.engine.files import write_torch
from mae_transfer.errors import CheckpointError, ConfigError

FORMAT = "mae-transfer training state, version 1"
_PATTERN = "step-*.pt"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the training state is saved, and how many are kept."""

    every_steps: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"checkpoint.every_steps={self.every_steps} must be at least 1")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep} must be at least 1")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def all_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob(_PATTERN))


def latest_checkpoint(folder: Path) -> Path | None:
    found = all_checkpoints(folder)
    return found[-1] if found else None


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write ``state`` (which has its ``step``) and delete all but the newest ``keep``, in this order."""
    path = checkpoint_path(folder, state["step"])
    write_torch(path, {"format": FORMAT, **state})
    for old in all_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A training state, on the CPU.

    Raises:
        CheckpointError: unreadable, or not a training state of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"cannot read training state {path}: {reason} "
            "Resume from another file of the folder with run.resume=PATH, or start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a training state of this project (the files in a run's checkpoints/ are); "
            "to start from weights alone, use the tools that take an encoder.safetensors"
        )
    return state
