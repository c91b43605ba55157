"""metrics.jsonl, TensorBoard and, where wanted, Weights & Biases: a line a step, no gaps or repeats over restarts."""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
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
    wandb: str | None = None  # project of Weights & Biases to log to as well; WANDB_MODE=offline keeps it on this disk
    peak_gflops: float | None = None  # what MFU is relative to, GFLOP/s of one process; null: measured at the start
    evaluate_every_epochs: float = 10.0  # on unseen images

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"log.every_steps={self.every_steps} must be at least 1")
        if self.wandb is not None and not self.wandb:
            raise ConfigError("log.wandb is empty; give the name of the project, or null for none")
        if self.peak_gflops is not None and not self.peak_gflops > 0:
            raise ConfigError(f"log.peak_gflops={self.peak_gflops} must be positive")
        if self.evaluate_every_epochs < 0:
            raise ConfigError(f"log.evaluate_every_epochs={self.evaluate_every_epochs} must not be negative")


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
    """Appends records to ``metrics.jsonl`` (and their numbers to TensorBoard and Weights & Biases).

    Args:
        key: of a record's step.
        last_step: the step resumed from. Lines beyond it belong to work that was lost; they are removed, so that the
            continued run writes them once.
        wandb: project to log to. The run there keeps its id in ``wandb_id.txt`` beside ``path``, so that whoever goes
            on in this folder goes on in that run.
        config: shown with the W&B run.

    Raises:
        ConfigError: W&B is wanted and not installed, or refuses to start.
    """

    def __init__(
        self,
        path: Path,
        *,
        key: str = "step",
        last_step: int = 0,
        tensorboard: Path | None = None,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._key = key
        self._wandb = None if wandb is None else _WandbRun(path.parent, project=wandb, config=dict(config or {}))
        if path.exists():
            kept = [record for record in _records(path) if record[key] <= last_step]
            write_text(path, "".join(_line(record) for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard is not None:
            self._writer = SummaryWriter(str(tensorboard), purge_step=last_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        numbers = {k: v for k, v in record.items() if k != self._key and isinstance(v, int | float)}
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, record[self._key])
        if self._wandb is not None:
            self._wandb.write(record[self._key], numbers)

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
        if self._wandb is not None:
            self._wandb.close()


def require_wandb() -> Any:
    """The ``wandb`` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "log.wandb is set and Weights & Biases is not installed; pip install wandb, or set log.wandb=null "
            "(metrics.jsonl and TensorBoard are written in any case)"
        ) from error


class _WandbRun:
    """One run of Weights & Biases, the same one each time that its folder is continued."""

    def __init__(self, folder: Path, *, project: str, config: dict[str, Any]) -> None:
        wandb = require_wandb()
        id_file = folder / "wandb_id.txt"
        known = id_file.is_file()
        run_id = id_file.read_text(encoding="utf-8").strip() if known else secrets.token_hex(8)
        try:
            self._run = wandb.init(
                project=project,
                id=run_id,
                name=folder.name,
                dir=str(folder),
                config=config,
                resume="allow",
                allow_val_change=True,  # what may differ on resume, such as log.*
            )
        except wandb.Error as error:
            raise ConfigError(
                f"log.wandb={project}: Weights & Biases does not start: {error}. Log in (wandb login), or keep its "
                "files on this disk with WANDB_MODE=offline"
            ) from error
        if not known:
            write_text(id_file, run_id + "\n")
        # W&B takes no step twice. The steps done again after a kill gave the same numbers the first time.
        self._next_step = int(self._run.step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self._next_step:
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON, which has no NaN and no infinity: those become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean) + "\n"
