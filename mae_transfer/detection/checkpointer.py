"""Detectron2's checkpointer, with whole files and strict loading."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from mae_transfer.engine.files import atomic_path, write_text
from mae_transfer.errors import CheckpointError


class StrictCheckpointer(DetectionCheckpointer):
    """Writes to a temporary name and renames; a key that does not fit is an error, not a line in the log."""

    def save(self, name: str, **extra: Any) -> None:
        """Write ``name``.pth with the model, everything checkpointable and ``extra``, and mark it the last one."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: item.state_dict() for key, item in self.checkpointables.items()}
        with atomic_path(Path(self.save_dir) / f"{name}.pth") as temporary:
            torch.save({"model": self.model.state_dict(), **state, **extra}, temporary)
        self.tag_last_checkpoint(f"{name}.pth")
        self.logger.info("Saved %s.pth", name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            content = torch.load(filename, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"cannot read checkpoint {filename}: {error}") from error
        if not isinstance(content, dict) or "model" not in content:
            raise CheckpointError(f"{filename} is no checkpoint of a detector: it has no entry 'model'")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        incompatible = super()._load_model(checkpoint)
        problems = [
            f"{kind}: {', '.join(map(str, keys[:5]))}{' …' if len(keys) > 5 else ''}"
            for kind, keys in (
                ("missing", incompatible.missing_keys),
                ("unexpected", incompatible.unexpected_keys),
                ("of another shape", incompatible.incorrect_shapes),
            )
            if keys
        ]
        if problems:
            raise CheckpointError("the checkpoint does not fit the configured model; " + "; ".join(problems))
        return incompatible
