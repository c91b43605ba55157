"""Write an encoder in the format that another tool reads; ``tools/convert_checkpoint.py`` on the command line."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mae_transfer.checkpoint.files import write_safetensors, write_torch
from mae_transfer.checkpoint.load import encoder_state, shape_text, summarise
from mae_transfer.checkpoint.read import Checkpoint, read_checkpoint
from mae_transfer.errors import CheckpointError

Tensors = dict[str, Tensor]


def _official(checkpoint: Checkpoint) -> Tensors:
    return checkpoint.tensors


def _encoder(checkpoint: Checkpoint) -> Tensors:
    return encoder_state(checkpoint.tensors)


def _below(prefix: str) -> Callable[[Checkpoint], Tensors]:
    return lambda checkpoint: {prefix + name: tensor for name, tensor in _encoder(checkpoint).items()}


# Format -> what it holds, under which key of the .pth, and the endings it may have.
FORMATS: dict[str, tuple[Callable[[Checkpoint], Tensors], str, tuple[str, ...]]] = {
    "backbone": (_encoder, "model", (".safetensors",)),
    "mae": (_official, "model", (".pth",)),
    "timm": (_encoder, "model", (".safetensors", ".pth")),
    "detectron2": (_below("backbone.net."), "model", (".pth",)),
    "mmseg": (_below("backbone."), "state_dict", (".pth",)),
}


def convert(source: str | Path, destination: str | Path, to: str, *, overwrite: bool = False) -> Checkpoint:
    """Read ``source`` of any supported family and write it as ``to``.

    Every encoder tensor is kept as it is, so converting there and back gives the same bits.

    Args:
        to: "backbone" our keys (.safetensors), "mae" the official file, decoder included if there was one (.pth),
            "timm" (.safetensors or .pth), "detectron2" ``backbone.net.*`` (.pth), "mmseg" ``backbone.*`` (.pth).

    Returns:
        What was read.

    Raises:
        CheckpointError: unreadable source, an ending that the format does not have, or a destination that exists.
    """
    if to not in FORMATS:
        raise CheckpointError(f"unknown format {to!r}; formats are: {', '.join(FORMATS)}")
    destination = Path(destination)
    select, key, endings = FORMATS[to]
    if destination.suffix not in endings:
        raise CheckpointError(f"{destination} should end in {' or '.join(endings)} for format {to}")
    if destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists and is left as it is; give another name, or --overwrite")
    checkpoint = read_checkpoint(source)
    tensors, metadata = select(checkpoint), checkpoint.info.to_metadata()
    if destination.suffix == ".safetensors":
        write_safetensors(destination, tensors, metadata)
    else:
        tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        write_torch(destination, {key: tensors, "metadata": metadata})
    return checkpoint


def inspect(path: str | Path) -> str:
    """Family, architecture, input convention, content and sha256 of a checkpoint, as text."""
    checkpoint = read_checkpoint(path)
    info, tensors = checkpoint.info, checkpoint.tensors
    encoder = encoder_state(tensors)
    rest = [name for name in tensors if name not in encoder]
    source = "from the file" if checkpoint.has_metadata else "assumed: the file does not say"
    rows = {
        "family": checkpoint.family,
        "encoder": f"{info.size}: width {info.width}, depth {info.depth}, heads {info.num_heads}",
        "patch": f"{info.patch_size[0]}x{info.patch_size[1]} px",
        "image": f"{info.image_size[0]}x{info.image_size[1]} px, {info.channels} channels",
        "mean, std": f"{info.mean}, {info.std} ({source})",
        "parameters": f"{sum(t.numel() for t in encoder.values()) / 1e6:.2f} M in the encoder, {len(encoder)} tensors",
        "positions": shape_text(tensors["pos_embed"]),
        "loads into": "every host (detection, segmentation, classification), by load_backbone",
        "not loaded": summarise(rest) or "nothing: all of it is the encoder",
        "sha256": sha256(checkpoint.path),
    }
    if info.git_commit:
        rows["git commit"] = info.git_commit
    return "\n".join([str(checkpoint.path), *(f"  {name:<11} {value}" for name, value in rows.items())])


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """``SRC DST --to FORMAT``, or ``--inspect SRC``."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of any supported family, or say what is in it.",
        epilog="formats: " + ", ".join(f"{name} ({' or '.join(row[2])})" for name, row in FORMATS.items()),
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint file, or run folder with encoder.safetensors")
    parser.add_argument("destination", metavar="DST", nargs="?", help="file to write")
    parser.add_argument("--to", choices=list(FORMATS), help="format of DST")
    parser.add_argument("--inspect", action="store_true", help="print what SRC holds and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    args = parser.parse_args(argv)
    if args.inspect:
        print(inspect(args.source))
        return 0
    if args.destination is None or args.to is None:
        parser.error("give SRC DST --to FORMAT, or --inspect SRC")
    checkpoint = convert(args.source, args.destination, args.to, overwrite=args.overwrite)
    print(f"{checkpoint.path} ({checkpoint.family}, {checkpoint.info.size}) -> {args.destination} ({args.to})")
    return 0
