"""Pickles of arrays, as Detectron2's releases are: read without running anything that they might name.

A pickle calls what it names. The reader here knows the few names that arrays and dicts are made of; any other is
refused before it is looked up.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy._core import multiarray

from mae_transfer.checkpoint.files import refuse_no_checkpoint
from mae_transfer.errors import CheckpointError


def _latin1(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as protocol 2 writes bytes, and as nothing else."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


def _from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """``numpy._core.numeric._frombuffer``, what protocol 5 builds arrays with."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


# What arrays, dtypes and dicts are pickled as; numpy 1 calls its own part "core", numpy 2 "_core".
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): multiarray._reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): multiarray.scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]


class _Refused(Exception):
    """A pickle names something that is neither an array nor a dict."""


def read_pickle(path: Path) -> Any:
    """Content of a ``.pkl`` of arrays and plain values, with tensors in the arrays' place.

    Raises:
        CheckpointError: it names anything else (which is not looked up, let alone run), or is damaged.
    """
    refuse_no_checkpoint(path)
    try:
        with path.open("rb") as file:
            # latin1: arrays that Python 2 has pickled, Caffe2's among them, are byte strings to it.
            return _to_tensors(_ArraysOnly(file, encoding="latin1").load())
    except RecursionError:
        raise CheckpointError(f"{path} holds itself, or is nested too deeply to be a checkpoint") from None
    except _Refused as refused:
        raise CheckpointError(
            f"{path} is refused: its pickle names {refused}, and only arrays, dicts and plain values are read, because "
            "a pickle can run code. If you trust it, convert it once where it was made: torch.save({'model': {name: "
            "torch.as_tensor(value) for name, value in weights.items()}}, 'clean.pth')"
        ) from None
    # A damaged pickle can fail in any of its own calls.
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a pickle ({error}); it is damaged or of another format. Compare its size with "
            "the source and fetch it again"
        ) from error
    except (AttributeError, ImportError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read as a pickle ({type(error).__name__}: {error})") from error


def _to_tensors(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _to_tensors(value) for key, value in node.items()}
    if isinstance(node, np.ndarray) and node.dtype.kind in "fiub":
        native = node.astype(node.dtype.newbyteorder("="))  # a copy: a pickle's buffer may be read-only
        return torch.from_numpy(np.ascontiguousarray(native))
    return node
