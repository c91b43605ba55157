"""What a checkpoint holds, and what of it each host would load."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_transfer.checkpoint.build import host_conflict, vit_arguments, weights_arguments
from mae_transfer.checkpoint.card import sha256
from mae_transfer.checkpoint.formats import FORMATS
from mae_transfer.checkpoint.formats.base import parts, traits
from mae_transfer.checkpoint.hub import HUGGING_FACE_FILES
from mae_transfer.checkpoint.load import load_checkpoint, refuse_broken
from mae_transfer.checkpoint.names import encoder_state, shape_text, summarise
from mae_transfer.checkpoint.read import Checkpoint, read_checkpoint
from mae_transfer.checkpoint.sharded import is_sharded
from mae_transfer.errors import CheckpointError, ConfigError, UserError
from mae_transfer.sizes import quarter_blocks
from mae_transfer.vit import VisionTransformer

_HOSTS = ("detection", "segmentation", "classification")
_NEITHER = "no: its weights are broken"
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".pkl")


def checkpoints_of(path: str | Path) -> list[str | Path]:
    """``path``, or, of a folder that is no checkpoint itself, the files in it that may be one."""
    folder = Path(path)
    whole = ("encoder.safetensors", *HUGGING_FACE_FILES)
    if not folder.is_dir() or is_sharded(folder) or any((folder / name).is_file() for name in whole):
        return [path]
    files: list[str | Path] = [file for file in sorted(folder.iterdir()) if file.suffix in _ENDINGS]
    return files or [path]  # reading says what is wrong with it


def examine(path: str | Path) -> dict[str, Any]:
    """Family, architecture, input convention, content, hosts, formats and sha256 of a checkpoint.

    Raises:
        CheckpointError: unreadable, or of no known family.
    """
    checkpoint = read_checkpoint(path)
    info, tensors = checkpoint.info, checkpoint.tensors
    encoder = encoder_state(tensors)
    broken = _broken(encoder, checkpoint.path)
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.family,
        "size": info.size,
        **dataclasses.asdict(info),
        "has_metadata": checkpoint.has_metadata,
        "traits": list(traits(tensors, info).values()),
        "parameters": sum(tensor.numel() for tensor in encoder.values()),
        "tensors": len(encoder),
        "positions_shape": shape_text(tensors["pos_embed"]) if "pos_embed" in tensors else None,
        "broken": broken,
        "hosts": dict.fromkeys(_HOSTS, _NEITHER) if broken else _hosts(checkpoint),
        "formats": {name: _NEITHER if broken else _as_format(checkpoint, name) for name in FORMATS},
        "besides_the_encoder": parts(name for name in tensors if name not in encoder),
        "left_out": _shortened(checkpoint.left_out),
        "sha256": sha256(checkpoint.path) if checkpoint.path.is_file() else None,
    }


def _broken(encoder: dict[str, Tensor], path: Path) -> str | None:
    try:
        refuse_broken(encoder, path)
    except CheckpointError as error:
        return str(error)
    return None


def _shortened(names: list[str]) -> str:
    """Names of what is not the encoder's: of a host's many, how many there are in each of its parts."""
    if summarise(names).count(", ") < 8:
        return summarise(names)
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part}.* ({count})" if count > 1 else part for part, count in counts.items())


def inspect(path: str | Path) -> str:
    """``examine``, as text."""
    found = examine(path)
    height, width = found["image_size"]
    source = "from the file" if found["has_metadata"] else "assumed: the file does not say"
    rows = {
        "family": found["family"],
        "encoder": f"{found['size']}: width {found['width']}, depth {found['depth']}, heads {found['num_heads']}",
        "besides": ", ".join(found["traits"]),
        "patch": f"{found['patch_size'][0]}x{found['patch_size'][1]} px",
        "image": f"{height}x{width} px, {found['channels']} channels",
        "mean, std": f"{found['mean']}, {found['std']} ({source})",
        "parameters": f"{found['parameters'] / 1e6:.2f} M in the encoder, {found['tensors']} tensors",
        "positions": found["positions_shape"] or "no table",
        "not encoder": found["besides_the_encoder"] or "nothing: all of it is the encoder",
        "not read": found["left_out"],
        "broken": found["broken"],
        "licence": found["license"] or "unknown",
        "source": found["source"],
        "sha256": found["sha256"],
        "git commit": found["git_commit"],
    }
    lines = [found["path"], *(f"  {name:<11} {value}" for name, value in rows.items() if value)]
    for heading, answers in (("would load into", found["hosts"]), ("can be written as", found["formats"])):
        lines.append(f"  {heading}")
        lines += [f"    {name:<15} {answer}" for name, answer in answers.items()]
    return "\n".join(lines)


def _hosts(checkpoint: Checkpoint) -> dict[str, str]:
    """What each host would load: detection and segmentation as published, at their image size and with patches of 16
    where the checkpoint has 14; classification takes the checkpoint's own architecture."""
    info = checkpoint.info
    patch = tuple(16 if side == 14 else side for side in info.patch_size)
    blocks = quarter_blocks(info.depth) if info.depth >= 4 else ()
    shared = {
        "patch_size": patch,
        "in_channels": info.channels,
        "width": info.width,
        "depth": info.depth,
        "num_heads": info.num_heads,
        "final_norm": False,
    }
    published: dict[str, tuple[int, dict[str, Any]]] = {
        "detection": (1024, {"cls_token": False, "window_size": 14, "relative_position": "decomposed"}),
        "segmentation": (512, {"window_size": 0, "relative_position": "bias", "layer_scale": 1.0}),
    }
    answers = {}
    for host, (side, recipe) in published.items():
        setting = ""
        if host_conflict(info, window_size=recipe["window_size"], relative_position=recipe["relative_position"]):
            recipe |= {"window_size": 0, "relative_position": info.relative_position}
            setting = f"under relative_position={info.relative_position} and without windows: "
        size = {"image_size": tuple(-(-side // p) * p for p in patch)}
        windows = {"global_blocks": blocks} if recipe["window_size"] else {}
        answers[host] = setting + _in_host(checkpoint, shared | size | recipe | windows | weights_arguments(info))
    return answers | {"classification": _in_host(checkpoint, vit_arguments(info))}


def _in_host(checkpoint: Checkpoint, arguments: dict[str, Any]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that nothing is copied into a model without memory
            with torch.device("meta"):
                vit = VisionTransformer(**arguments)
            report = load_checkpoint(vit, checkpoint)
    except (CheckpointError, ConfigError) as error:
        return f"no: {error}"
    answers = [f"{len(report.loaded)} tensors as they are"]
    if report.resized:
        folded = summarise(report.resized)
        shapes = ", ".join(dict.fromkeys(report.resized.values()))
        answers.append(f"resized {folded}: {shapes}")
    if report.missing:
        answers.append(f"new {summarise(report.missing)}")
    unused = [name for name in report.unexpected if name in encoder_state(checkpoint.tensors)]
    if unused:
        answers.append(f"without {summarise(unused)}")
    return "; ".join(answers)


def _as_format(checkpoint: Checkpoint, name: str) -> str:
    try:
        exported = FORMATS[name].export(checkpoint.tensors, checkpoint.info)
    except UserError as error:
        return f"no: {error}"
    return "yes" + (f", without {parts(exported.left_out)}" if exported.left_out else "")
