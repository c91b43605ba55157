"""One reader for every supported checkpoint: recognise the family, return tensors in our key names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_transfer.checkpoint.files import read_safetensors, read_torch
from mae_transfer.checkpoint.info import EncoderInfo, infer_info
from mae_transfer.checkpoint.pickles import read_pickle
from mae_transfer.checkpoint.sharded import is_sharded, read_facts, read_shards
from mae_transfer.errors import CheckpointError

# The state dict of a training checkpoint hides below one of these.
_NESTS = ("model", "state_dict", "model_state", "module")
# Prefixes of hosts and wrappers around an encoder in our names, longest first.
_PREFIXES = ("backbone.net.", "backbone.", "module.", "encoder.", "net.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: the file read.
        family: "mae-transfer", "mae" (official pretraining), "mae-finetuned",
            "vit" (the same names without a decoder, timm's among them), "detectron2", "mmseg".
        tensors: in our key names; decoder and heads included where the file has them.
        info: architecture and input convention.
        has_metadata: the input convention was read from the file, not assumed.
    """

    path: Path
    family: str
    tensors: dict[str, Tensor]
    info: EncoderInfo
    has_metadata: bool


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read any supported checkpoint file, a run folder of ours, or a sharded training state in one.

    Raises:
        CheckpointError: missing, damaged, unsafe, or of an unknown family.
    """
    path = resolve_path(path)
    tensors, metadata = read_tensors(path)
    tensors, prefix = strip_prefix(tensors)
    if metadata.get("family"):
        info = EncoderInfo.from_metadata(metadata, str(path))
        return Checkpoint(path=path, family=info.family, tensors=tensors, info=info, has_metadata=True)
    family = recognise(tensors, prefix)
    info = infer_info(tensors, family=family, source=str(path))
    return Checkpoint(path=path, family=family, tensors=tensors, info=info, has_metadata=False)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the names they have in the file, and metadata, of any file that ``read_checkpoint`` takes.

    Raises:
        CheckpointError: missing, damaged, unsafe, or without tensors.
    """
    path = resolve_path(path)
    metadata: dict[str, str] = {}
    if path.is_dir():
        tensors = {name.removeprefix("model."): tensor for name, tensor in read_shards(path, "model.").items()}
        metadata = {str(key): str(value) for key, value in read_facts(path).get("metadata", {}).items()}
    elif path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
    else:
        content = read_pickle(path) if path.suffix == ".pkl" else read_torch(path)
        tensors = find_state_dict(content, path)
        if isinstance(content, Mapping) and isinstance(content.get("metadata"), Mapping):
            metadata = {str(key): str(value) for key, value in content["metadata"].items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a Vision Transformer")
    return tensors, metadata


def resolve_path(path: str | Path) -> Path:
    """What to read: ``path`` itself, or ``encoder.safetensors`` of a run folder.

    Raises:
        CheckpointError: nothing there.
    """
    path = Path(path)
    if path.is_dir() and not is_sharded(path):
        inside = path / "encoder.safetensors"
        if not inside.is_file():
            raise CheckpointError(
                f"{path} is a folder without encoder.safetensors; expected a checkpoint file or a finished run folder"
            )
        return inside
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; give the path of a .safetensors, .pth or .pkl file")
    return path


def find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in what ``torch.load`` gave, wherever it is nested."""
    while isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
        nest = next((key for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    found = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(f"{path} holds no state dict: found {found}, expected tensors, or one of {', '.join(_NESTS)}")


def strip_prefix(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Take a host's prefix off the encoder's tensors; everything outside it belongs to the host and is dropped."""
    if "patch_embed.proj.weight" in tensors:
        return tensors, ""
    for prefix in sorted(
        {name[: -len("patch_embed.proj.weight")] for name in tensors if name.endswith(".patch_embed.proj.weight")},
        key=len,
    ):
        if any(prefix.endswith(known) for known in _PREFIXES):
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}, prefix
    return tensors, ""


def recognise(tensors: Mapping[str, Tensor], prefix: str) -> str:
    """Family of a file without our metadata, from its key names."""
    if prefix.endswith("backbone.net."):
        return "detectron2"
    if prefix.endswith("backbone."):
        return "mmseg"
    if "decoder_pred.weight" in tensors or "mask_token" in tensors:
        return "mae"
    return "mae-finetuned" if "fc_norm.weight" in tensors else "vit"
