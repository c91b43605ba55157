"""A training state in a folder: safetensors shards as torch.distributed.checkpoint writes them, and a manifest.

The manifest is written last and holds the size and checksum of every shard, so a folder without one is not a
checkpoint, and damage is found before anything is loaded. No pickle is involved: tensors are safetensors, the rest is
JSON.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mae_transfer.checkpoint.files import atomic_write
from mae_transfer.errors import CheckpointError

MANIFEST = "manifest.json"
_CHUNK = 1 << 24


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a finished sharded training state."""
    return (path / MANIFEST).is_file()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Seal ``folder``: ``facts`` (JSON values) and what every file in it must be."""
    files = {path.name: _signature(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"facts": dict(facts), "files": files}, indent=1), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What the manifest says of the run.

    Raises:
        CheckpointError: no manifest, or an unreadable one.
    """
    return dict(_manifest(folder)["facts"])


def verify_shards(folder: Path) -> None:
    """Compare every shard with the manifest.

    Raises:
        CheckpointError: a file is missing, too short, too long, or its content has changed.
    """
    for name, expected in _manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is incomplete: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, its manifest says "
                f"{expected['bytes']}"
            )
        if _signature(path) != expected:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: the content of {name} has changed since it was saved"
            )


def read_shards(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors whose names start with ``prefix``, put together from their shards, on the CPU.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader  # here: half a second that few need
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
        }
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the shards of {folder}: {error}") from error
    fill_from_shards(folder, tensors, alone=True)
    return tensors


def fill_from_shards(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Read into ``tensors`` in place, each process its own part.

    Args:
        alone: this process reads by itself; else all processes of the group call this together.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or unreadable.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone: that is what was meant
            dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (CheckpointException, SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the shards of {folder}: {error}") from error


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no sharded checkpoint: cannot read its {MANIFEST} ({error})") from error
    if not isinstance(content, dict) or not {"facts", "files"} <= set(content):
        raise CheckpointError(f"{folder / MANIFEST} does not describe a checkpoint; expected facts and files")
    return content


def _signature(path: Path) -> dict[str, int]:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}
