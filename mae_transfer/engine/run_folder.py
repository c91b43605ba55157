"""The folder of a run: made once, refused when it holds something else, continued on resume."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

import torch

from mae_transfer.checkpoint.sharded import is_sharded
from mae_transfer.engine.checkpoints import (
    clear_leftovers,
    latest_checkpoint,
    latest_good_checkpoint,
    verify_checkpoint,
)
from mae_transfer.engine.files import write_text
from mae_transfer.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

RESUME_MODES = ("auto", "never")
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "omegaconf", "safetensors", "timm")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, its seed, and what to do with what is already there."""

    dir: str = "runs/run"
    seed: int = 0
    resume: str = "never"  # auto: continue if the folder has a checkpoint, else start; never; or a checkpoint's path
    overwrite: bool = False  # delete the folder's content and start

    def __post_init__(self) -> None:
        if not self.dir:
            raise ConfigError("run.dir is empty; name the folder to write to")
        if self.seed < 0:
            raise ConfigError(f"run.seed={self.seed} must not be negative")
        if self.overwrite and self.resume != "never":
            raise ConfigError(f"run.overwrite=true and run.resume={self.resume} contradict each other; give one")


class RunFolder:
    """Paths below ``run.dir``, or whatever ``key`` of a config names the folder."""

    def __init__(self, root: str | Path, *, key: str = "run.dir") -> None:
        self.root = Path(root)
        self.key = key
        self.lock = self.root / ".in-use"
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.txt"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.reconstructions = self.root / "reconstructions"
        self.checkpoints = self.root / "checkpoints"
        self.nonfinite = self.root / "nonfinite"
        self.model = self.root / "model.safetensors"
        self.encoder = self.root / "encoder.safetensors"
        self.average_model = self.root / "model_ema.safetensors"
        self.average_encoder = self.root / "encoder_ema.safetensors"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the folder, so that no second run writes to it: not even when this process's parent was killed and the
        command started again. The operating system lets go of it when the process ends, however it ends.

        Raises:
            ConfigError: another process holds it.
        """
        with self.lock.open("a+", encoding="utf-8") as file:
            if not _take(file):
                raise self._used_by_another()
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                self.lock.unlink(missing_ok=True)

    def check_free(self) -> None:
        """Raises ConfigError while another run is writing here."""
        with suppress(FileNotFoundError), self.lock.open("r+", encoding="utf-8") as file:
            if not _take(file):
                raise self._used_by_another()

    def _used_by_another(self) -> ConfigError:
        owner = self.lock.read_text(encoding="utf-8").strip() or "another process"
        return ConfigError(f"{self.key}={self.root} is being written to by {owner}; stop it, or name another")

    def write_description(self, config_yaml: str) -> None:
        """``config.yaml`` and ``environment.txt``."""
        write_text(self.config, config_yaml)
        write_text(self.environment, describe_environment())


def _take(file: IO[str]) -> bool:
    """Lock an open file for this process; False if another has it. True where files cannot be locked."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process's own: data workers do not inherit it
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        logger.warning("%s cannot be locked (%s): take care that no second run writes there", file.name, error)
    return True


def run_before(config: RunConfig, *, restarted: bool = False) -> RunFolder | None:
    """The folder of the run that this one goes on from, as ``open_run_folder`` will; None for a fresh start. Nothing is
    verified or written."""
    folder = RunFolder(config.dir)
    resume = _resume(config, folder, restarted)
    if resume == "never":
        return None
    if resume == "auto":
        return folder if latest_checkpoint(folder.checkpoints) else None
    path = Path(resume)
    if path.is_dir() and latest_checkpoint(path / "checkpoints"):
        return RunFolder(path)
    inside = path if path.is_dir() and not is_sharded(path) else path.parent  # the folder of checkpoints
    return RunFolder(inside.parent) if path.exists() else None


def open_run_folder(
    config: RunConfig, *, restarted: bool = False, trains: bool = True
) -> tuple[RunFolder, Path | None]:
    """The folder ready to write to, and the verified checkpoint to start from, None for a fresh start.

    Args:
        restarted: torchrun starts the same command again because a process died: go on from the newest checkpoint,
            whatever the command says of resuming and overwriting.
        trains: whether there will be training states to keep.

    Raises:
        ConfigError: the folder is not empty and neither resumed nor overwritten; another run is writing to it; a
            checkpoint to resume from is missing.
        CheckpointError: the checkpoint to resume from is damaged, or all of them are.
    """
    folder = RunFolder(config.dir)
    if folder.root.exists() and not folder.root.is_dir():
        raise ConfigError(f"run.dir={folder.root} is a file; name a folder")
    folder.check_free()
    resume = _resume(config, folder, restarted)
    checkpoint = _checkpoint_to_resume(folder, resume)
    used = folder.root.is_dir() and any(_holds_something(path) for path in folder.root.iterdir() if path != folder.lock)
    own = checkpoint is not None and checkpoint.resolve().is_relative_to(folder.root.resolve())
    # Killed before its first checkpoint: only what write_description and the log left behind. Nothing to lose.
    unborn = (resume == "auto" or restarted) and folder.config.is_file() and not folder.encoder.exists()
    if used and config.overwrite and not restarted:
        shutil.rmtree(folder.root)
    elif used and not own and not unborn:
        raise ConfigError(
            f"run.dir={folder.root} is not empty; choose another folder, continue with run.resume=auto, "
            "or delete what is there with run.overwrite=true"
        )
    (folder.checkpoints if trains else folder.root).mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder.checkpoints)
    return folder, checkpoint


def _resume(config: RunConfig, folder: RunFolder, restarted: bool) -> str:
    """``run.resume``, or what a restart makes of it."""
    again = restarted and (config.resume == "never" or latest_checkpoint(folder.checkpoints))
    return "auto" if again else config.resume


def _holds_something(path: Path) -> bool:
    """Not an empty folder, as a run makes them: one may be killed before it has written anything at all."""
    return not path.is_dir() or any(path.iterdir())


def _checkpoint_to_resume(folder: RunFolder, resume: str) -> Path | None:
    if resume == "never":
        return None
    if resume == "auto":
        return latest_good_checkpoint(folder.checkpoints)
    path = Path(resume)
    if path.is_dir() and not is_sharded(path):
        found = latest_good_checkpoint(path / "checkpoints") or latest_good_checkpoint(path)
        if found is None:
            raise ConfigError(f"run.resume={resume}: no checkpoint found in this folder")
        return found
    if not path.exists():
        raise ConfigError(f"run.resume={resume} is neither auto, never, a checkpoint nor a run folder")
    verify_checkpoint(path)
    return path


def weights_file(path: Path) -> Path:
    """``path``, or of a run folder its ``model.safetensors``, or the newest training state while it still runs.

    Raises:
        CheckpointError: a folder that holds neither.
    """
    if not path.is_dir() or is_sharded(path):
        return path
    finished = path / "model.safetensors"
    found = finished if finished.is_file() else latest_checkpoint(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds neither model.safetensors nor a training state in checkpoints/")
    return found


def git_commit() -> str:
    """The commit of the sources in use, with ``-dirty`` when they differ from it; ``unknown`` outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def describe_environment() -> str:
    """Command, commit, versions and machine, one ``name: value`` a line."""
    lines = {
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    for package in _PACKAGES:
        try:
            lines[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            lines[package] = "not installed"
    return "".join(f"{name}: {value}\n" for name, value in lines.items())


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the standard library knows less, but something
    return platform.processor() or "unknown"
