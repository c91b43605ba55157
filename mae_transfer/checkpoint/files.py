"""Writing files so that a reader sees the old one or the new one, never half of either; reading tensors safely."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
Allowed = Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]]
_HARMLESS: Allowed = [
    argparse.Namespace,
    *((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "uint32", "bool")),
    np.ndarray,
    *((multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


class _History:
    """In place of MMEngine's HistoryBuffer: the curves of a run, which say nothing here."""


def _method_of_history(owner: Any, name: str) -> None:
    """In place of ``getattr``, through which a HistoryBuffer names its own statistics.

    Raises:
        UnpicklingError: asked for anything else.
    """
    if owner is not _History:
        raise pickle.UnpicklingError(f"the file asks for {name} of {owner}")


# Stand-ins under the names that MMEngine's checkpoints use; segmentation, which goes on with the curves, has the real.
HISTORIES: Allowed = [
    (_History, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_method_of_history, "builtins.getattr"),
]


# What torch says of a name that it does not look up, and of a pickle that it does not read.
_NAMED = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)|Unsupported class (\S+)")
_OPERAND = re.compile(r"operand \d+")
# What torch.load raises of files that are cut off or changed in the middle.
_DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(struct.error, MemoryError, OverflowError),
)


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


def refuse_no_checkpoint(path: Path) -> None:
    """Raises CheckpointError where the first bytes tell a file that stands in a checkpoint's place."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself; fetch that with: git lfs pull")
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, not a checkpoint; fetch the file that the page leads to")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: no safetensors file, or a truncated one.
    """
    refuse_no_checkpoint(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); expected a complete .safetensors file. "
            "If it was copied or downloaded, compare its size with the source and fetch it again"
        ) from error


def read_torch(path: Path, *, histories: Allowed = HISTORIES) -> Any:
    """Content of a ``torch.save`` file that holds tensors and plain containers only.

    ``argparse.Namespace``, numpy's numbers and arrays and MMEngine's histories, which training checkpoints carry, are
    tolerated.

    Args:
        histories: what MMEngine's histories are read as.

    Raises:
        CheckpointError: not such a file, truncated, or a pickle that holds anything else.
    """
    refuse_no_checkpoint(path)
    try:
        with torch.serialization.safe_globals([*_HARMLESS, *histories]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # said below, where it does not work out
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        named = _NAMED.search(str(error))
        if named is None:
            operand = _OPERAND.search(str(error))
            hint = f"; its pickle has {operand[0]}, of a protocol other than torch.save's own" if operand else ""
            raise CheckpointError(
                f"{path} cannot be read as a PyTorch checkpoint{hint}. It is damaged or of another format: expected "
                ".safetensors, or .pth written by torch.save(content, path)"
            ) from error
        raise CheckpointError(
            f"{path} is refused: it names {named[1] or named[2]}, and only tensors and plain values are read, because "
            "a pickle can run code. If you trust it, convert it once where it was made: "
            "torch.save({'model': {k: v for k, v in state_dict.items()}}, 'clean.pth')"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}: {error}); it is damaged or of "
            "another format. Expected .safetensors, or .pth written by torch.save"
        ) from error
