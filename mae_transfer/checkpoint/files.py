"""Writing files so that a reader sees the old one or the new one, never half of either; reading tensors safely."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mae_transfer.errors import CheckpointError

# What torch.load may build besides tensors and plain values: the arguments of a run, and its best accuracy as numpy
# gives it. numpy 1 calls its own part "core", numpy 2 "_core".
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    *((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; flushed to disk and renamed when the block ends well.

    When the block raises, the temporary file is removed and what stood at ``path`` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (made contiguous, on the CPU) and string metadata atomically."""
    own = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        # safetensors makes files that only their owner may read: give back what the user's umask says.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(own, str(temporary), metadata=dict(metadata))
        temporary.chmod(mode)


def write_torch(path: str | Path, content: Any) -> None:
    """``torch.save`` written atomically."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: no safetensors file, or a truncated one.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); expected a complete .safetensors file. "
            "If it was copied or downloaded, compare its size with the source and fetch it again"
        ) from error


def read_torch(path: Path) -> Any:
    """Content of a ``torch.save`` file that holds tensors and plain containers only.

    ``argparse.Namespace`` and numpy's numbers, which training checkpoints carry, are tolerated.

    Raises:
        CheckpointError: not such a file, truncated, or a pickle that holds anything else.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} is refused: it is no checkpoint of tensors and plain values ({first}). Pickles that hold other "
            "objects can run code when they are read. If you trust it, convert it once where it was made: "
            "torch.save({'model': {k: v for k, v in state_dict.items()}}, 'clean.pth')"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch checkpoint ({error}); it is damaged or of another format. "
            "Expected .safetensors, or .pth written by torch.save"
        ) from error
