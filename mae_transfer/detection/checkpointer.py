"""Detectron2's checkpointer, with whole files and strict loading."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import GeneralizedRCNN

from mae_transfer.checkpoint.detectors import describe_detector
from mae_transfer.engine.checkpoints import verify_checkpoint
from mae_transfer.engine.files import write_text, write_torch
from mae_transfer.errors import CheckpointError

logger = logging.getLogger(__name__)

_PERIODIC = re.compile(r"model_\d{7}\.pth")


class StrictCheckpointer(DetectionCheckpointer):
    """Writes to a temporary name and renames; a key that does not fit is an error, not a line in the log."""

    def save(self, name: str, **extra: Any) -> None:
        """Write ``name``.pth with the model, everything checkpointable and ``extra``, and mark it the last one."""
        state = {key: item.state_dict() for key, item in self.checkpointables.items()}
        if self._write(name, {**state, **extra}):
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **extra: Any) -> None:
        """Write ``name``.pth with the model alone: to be used, not to go on from."""
        self._write(name, extra)

    def _write(self, name: str, content: dict[str, Any]) -> bool:
        if not self.save_dir or not self.save_to_disk:
            return False
        model = {"model": self.model.state_dict()}
        if isinstance(self.model, GeneralizedRCNN):
            model["metadata"] = describe_detector(self.model)  # its input's mean and std go where the weights go
        write_torch(Path(self.save_dir) / f"{name}.pth", {**model, **content})
        self.logger.info("Saved %s.pth", name)
        return True

    def prune(self, *, keep: int) -> None:
        """Delete the periodic checkpoints but the newest ``keep``."""
        if self.save_dir and self.save_to_disk:
            for old in self._periodic()[:-keep]:
                old.unlink()

    def _periodic(self) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in Path(self.save_dir).glob("model_*.pth") if _PERIODIC.fullmatch(path.name))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def last_good(self) -> str:
        """The last checkpoint, or the newest whole one where that is damaged or gone (a warning names it).

        Raises:
            CheckpointError: there were some, and none is whole.
        """
        for path in self._candidates():
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s; falling back to the checkpoint before it", error)
            else:
                return str(path)
        raise CheckpointError(
            f"no checkpoint in {self.save_dir} is whole; start the run anew in another train.output_dir"
        )

    def _candidates(self) -> Iterator[Path]:
        last = Path(self.get_checkpoint_file())
        yield last
        yield from (path for path in reversed(self._periodic()) if path != last)

    def load_for_inference(self, path: str) -> dict[str, Any]:
        """Load the weights that evaluation used: the average over training where one was kept.

        Returns:
            What else the file holds.
        """
        content = self.load(path, checkpointables=[])
        average = content.get("trainer", {}).get("ema")
        if average:
            self.model.load_state_dict(average, strict=False)  # of trained parameters; the rest is loaded already
        return content

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
