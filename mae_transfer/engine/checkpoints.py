"""Training states on disk: whole or not there, verified before use, the newest few kept.

One process writes one file, ``step-00000100.pt``. Several write a folder ``step-00000100/`` together, each its own
part, in a thread while training goes on (torch.distributed.checkpoint); the folder gets its name when all of it is on
disk. Either kind is read by any number of processes.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from mae_transfer.checkpoint.sharded import (
    fill_from_shards,
    is_sharded,
    read_facts,
    verify_shards,
    write_manifest,
)
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.files import flush_folder, write_torch
from mae_transfer.engine.state import set_training_tensors, shard_like, training_tensors
from mae_transfer.errors import CheckpointError, ConfigError, RunFailed

logger = logging.getLogger(__name__)

FORMAT = "mae-transfer training state, version 2"
_SECTIONS = ("model", "optimizer", "ema")
_UNFINISHED = ".unfinished"
_NO_STATE = (
    "is not a training state of this project (the files in a run's checkpoints/ are); to start from weights alone, use "
    "the tools that take an encoder.safetensors"
)


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


def all_checkpoints(folder: Path) -> list[Path]:
    """Finished training states of either kind, oldest first."""
    found = [path for path in folder.glob("step-*") if path.suffix == ".pt" or is_sharded(path)]
    return sorted(found, key=lambda path: path.stem)


def latest_checkpoint(folder: Path) -> Path | None:
    found = all_checkpoints(folder)
    return found[-1] if found else None


def latest_good_checkpoint(folder: Path) -> Path | None:
    """The newest training state that is whole; damaged ones are named in a warning and passed over.

    Raises:
        CheckpointError: there are some, and all are damaged: going on from nothing would throw the run away.
    """
    found = all_checkpoints(folder)
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
        else:
            return path
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {folder} are damaged (see the warnings above); start the run anew with "
            "run.overwrite=true, or in another run.dir"
        )
    return None


def verify_checkpoint(path: Path) -> None:
    """Read a training state through and compare its checksums.

    Raises:
        CheckpointError: missing, incomplete or changed since it was written.
    """
    if path.is_dir():
        verify_shards(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save's container, which has a checksum for every record
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is cut off, or {_NO_STATE} ({error})") from error
    except (OSError, EOFError, zlib.error, NotImplementedError) as error:
        raise CheckpointError(f"cannot read training state {path}: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: the content of {damaged} has changed since it was saved")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A training state that was opened once, to be looked at and then put back.

    Attributes:
        facts: everything but its tensors: ``step``, ``config`` and so on.
        whole: the tensors of a state in one file, as ``training_tensors`` names them; None for a sharded one, of which
            each process reads its part when it is put back.
    """

    path: Path
    facts: dict[str, Any]
    whole: dict[str, Tensor] | None

    def restore(
        self, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None, alone: bool
    ) -> None:
        """Put the tensors into model, optimiser and average, sharded or not.

        Args:
            alone: one process; several call this together.

        Raises:
            CheckpointError: unreadable, or of another model.
        """
        own = training_tensors(model, optimizer, average)
        if self.whole is None:
            fill_from_shards(self.path, own, alone=alone)
        else:
            own = shard_like(self.whole, own, source=str(self.path))
        set_training_tensors(model, optimizer, average, own)


def open_state(path: Path) -> TrainingState:
    """Open a training state of either kind.

    Raises:
        CheckpointError: unreadable, or of another format.
    """
    if path.is_dir():
        facts = read_facts(path)
        _check_format(facts, path)
        return TrainingState(path=path, facts=facts, whole=None)
    content = load_file(path)
    sections = {section: content.pop(section) for section in _SECTIONS if section in content}
    whole = {f"{section}.{name}": tensor for section, part in sections.items() for name, tensor in part.items()}
    return TrainingState(path=path, facts=content, whole=whole)


def load_file(path: Path) -> dict[str, Any]:
    """The content of a one-file training state, on the CPU.

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
    if not isinstance(state, dict):
        state = {}
    _check_format(state, path)
    return state


def _check_format(facts: Mapping[str, Any], path: Path) -> None:
    if facts.get("format") == FORMAT:
        return
    if str(facts.get("format", "")).startswith("mae-transfer training state"):
        raise CheckpointError(
            f"{path} is a {facts['format']}; this version reads version 2. Finish the run with the version that "
            "started it; its weights can be used in any case"
        )
    raise CheckpointError(f"{path} {_NO_STATE}")


class CheckpointWriter:
    """Saves training states below ``folder``.

    One process writes before it goes on. Several return from ``save`` as soon as the tensors are copied; the writing
    is finished by ``seal``, which all processes call at the same step, once each has said by ``completed`` that its
    part is on disk (they exchange that without waiting), or by ``finish``, which waits.
    """

    def __init__(self, folder: Path, *, keep: int, processes: Processes) -> None:
        self.folder = folder
        self.keep = keep
        self.processes = processes
        self._started = 0
        self._sealed = 0
        self._writing: Future[Any] | None = None
        self._sealing: Future[None] | None = None
        self._facts: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def completed(self) -> int:
        """How many saves of this process are on disk."""
        return self._started if self._writing is None or self._writing.done() else self._started - 1

    @property
    def failed(self) -> bool:
        """Whether this process's part could not be written."""
        return any(f is not None and f.done() and f.exception() is not None for f in (self._writing, self._sealing))

    def save(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write ``facts`` (JSON values, its ``step`` among them) and ``tensors`` (as ``training_tensors`` gives them).

        Raises:
            RunFailed: the disk is full, or the folder cannot be written. The states before this one are untouched.
        """
        self.finish()
        self._facts = {"format": FORMAT, **facts}
        if not self.processes.is_distributed:
            content: dict[str, Any] = dict(self._facts)
            for name, tensor in tensors.items():
                section, _, key = name.partition(".")
                content.setdefault(section, {})[key] = tensor
            write_torch(self._path(".pt"), content)
            self._prune()
            return
        if self.processes.is_main:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        self.processes.barrier()
        self._started += 1
        writer = HuggingFaceStorageWriter(str(self._unfinished), save_distributed=True)
        group = self.processes.saving
        self._writing = cast("Future[Any]", dcp.async_save(dict(tensors), storage_writer=writer, process_group=group))

    def seal(self, completed: int) -> None:
        """Give the newest state its name, in the background, if ``completed``, agreed by all, says it is on disk."""
        if completed < self._started or self._sealed == self._started:
            return
        self._sealed = self._started
        if self.processes.is_main:
            self._sealing = self._thread.submit(self._seal, dict(self._facts), self._unfinished, self._path(""))

    def finish(self) -> None:
        """Wait until everything saved is on disk under its name. All processes call this together.

        Raises:
            RunFailed: something could not be written.
        """
        if not self.processes.is_distributed:
            return
        reason = _outcome(self._writing)
        self._raise_together(reason)
        self.seal(self._started)
        reason = _outcome(self._sealing)
        self._raise_together(reason)

    def raise_failure(self) -> None:
        """After any process has said ``failed``: all call this, and all fail with the reason.

        Raises:
            RunFailed: with the reason of the process that failed.
        """
        self._raise_together(_outcome(self._writing) or _outcome(self._sealing))

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _raise_together(self, reason: str | None) -> None:
        reasons = [text for text in self.processes.gather(reason) if text]
        if reasons:
            newest = latest_checkpoint(self.folder)
            kept = f"the last whole one is {newest}" if newest else "there is none before it"
            raise RunFailed(f"cannot write the checkpoint of step {self._facts['step']}: {reasons[0]}; {kept}")

    def _path(self, suffix: str) -> Path:
        return self.folder / f"step-{self._facts['step']:08d}{suffix}"

    @property
    def _unfinished(self) -> Path:
        path = self._path("")
        return path.with_name(f".{path.name}{_UNFINISHED}")

    def _seal(self, facts: dict[str, Any], unfinished: Path, final: Path) -> None:
        write_manifest(unfinished, facts)
        flush_folder(unfinished)
        _remove(final)
        unfinished.rename(final)
        flush_folder(final.parent)
        self._prune()

    def _prune(self) -> None:
        for old in all_checkpoints(self.folder)[: -self.keep]:
            _remove(old)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written below ``folder``. Only one process calls this, before training."""
    for path in folder.glob(".step-*"):
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint: a folder stops being one before its files go."""
    if path.is_dir():
        hidden = path.with_name(f".{path.name.lstrip('.')}{_UNFINISHED}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def _outcome(future: Future[Any] | None) -> str | None:
    """Wait for ``future``; why it failed, or None."""
    if future is None:
        return None
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, CheckpointException):  # one reason from each process that failed
        failures = error.failures.values()
        return "; ".join(sorted({str(failure[0]) for failure in failures})) or str(error)
    if isinstance(error, OSError | RuntimeError):
        return str(error)
    raise error
