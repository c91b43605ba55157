"""metrics.jsonl and TensorBoard: a line a step, without gaps or repeats across restarts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from mae_transfer.engine.files import write_text
from mae_transfer.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is recorded along the way, and how often."""

    every_steps: int = 20  # every step has its line; they are read from the device and written out this often
    tensorboard: bool = True
    evaluate_every_epochs: float = 10.0  # loss on data.val_path; 0 for never
    evaluate_images: int = 2000  # at most so many of data.val_path
    reconstruct_every_epochs: float = 20.0  # a picture of the same few images; 0 for never
    reconstruct_images: int = 8

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"log.every_steps={self.every_steps} must be at least 1")
        for name in ("evaluate_every_epochs", "reconstruct_every_epochs"):
            if getattr(self, name) < 0:
                raise ConfigError(f"log.{name}={getattr(self, name)} must not be negative; 0 means never")
        for name in ("evaluate_images", "reconstruct_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"log.{name}={getattr(self, name)} must be at least 1")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dicts; a last line cut off by a kill is left out.

    Raises:
        DataError: the file is missing, or a line other than the last is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    return list(_records(path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            return
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from error


class MetricsLog:
    """Appends records to ``metrics.jsonl`` (and their numbers to TensorBoard).

    Args:
        last_step: the step resumed from. Lines beyond it belong to work that was lost; they are removed, so that the
            continued run writes them once.
    """

    def __init__(self, path: Path, *, last_step: int = 0, tensorboard: Path | None = None) -> None:
        if path.exists():
            kept = [record for record in _records(path) if record["step"] <= last_step]
            write_text(path, "".join(_line(record) for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard is not None:
            self._writer = SummaryWriter(str(tensorboard), purge_step=last_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        if self._writer is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """To the disk itself: a checkpoint written after this implies the lines up to it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON, which has no NaN and no infinity: those become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean) + "\n"
