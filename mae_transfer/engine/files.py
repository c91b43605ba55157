"""Files of a run are either whole or not there, and a full disk is a failed run with its reason."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mae_transfer.checkpoint import atomic_write, write_safetensors
from mae_transfer.errors import RunFailed


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; flushed to disk and renamed when the block ends well.

    A process killed inside the block leaves the old file as it was, and at most a hidden temporary file.

    Raises:
        RunFailed: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    try:
        with atomic_write(path) as temporary:
            yield temporary
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"cannot write {path}: {error}") from error


def write_torch(path: str | Path, content: Any) -> None:
    """``torch.save``, atomically."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # its writer reports a full disk as an internal inconsistency
            raise OSError(f"writing stopped half-way, the disk may be full ({str(error).splitlines()[0]})") from error


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically."""
    with atomic_path(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
