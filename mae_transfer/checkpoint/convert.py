"""Write an encoder in the format that another tool reads; ``tools/convert_checkpoint.py`` on the command line."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mae_transfer.checkpoint.card import write_card
from mae_transfer.checkpoint.files import atomic_write, write_safetensors, write_torch
from mae_transfer.checkpoint.formats import FORMATS, Exported, Format
from mae_transfer.checkpoint.formats.base import parts
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.checkpoint.inspection import checkpoints_of, examine, inspect
from mae_transfer.checkpoint.load import refuse_broken
from mae_transfer.checkpoint.names import encoder_state
from mae_transfer.checkpoint.read import Checkpoint, read_checkpoint
from mae_transfer.checkpoint.resize import METHODS, resize_encoder
from mae_transfer.errors import EXIT_BAD_INPUT, CheckpointError


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written.

    Attributes:
        checkpoint: what was read, resized where that was asked for.
        left_out: our names of what the format does not hold.
        card: the model card; None where none was wanted.
    """

    checkpoint: Checkpoint
    destination: Path
    left_out: list[str]
    card: Path | None


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    encoder_only: bool = False,
    patch_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
    resize: str = "pinv",
    card: bool = True,
) -> Conversion:
    """Read ``source`` of any supported family and write it as ``to``.

    Every encoder tensor is kept as it is, so converting there and back gives the same bits, unless it is resized.

    Args:
        to: "backbone" our keys (.safetensors), "mae" the official file, decoder included if there was one (.pth),
            "timm" (.safetensors or .pth), "hf" a folder that transformers reads, "detectron2" ``backbone.net.*``
            (.pth), "mmseg" ``backbone.*`` (.pth).
        encoder_only: leave out decoder, mask tokens and heads, whatever the format.
        patch_size, image_size: (height, width) in pixels to take projection and positions to; None for the source's.
            With another patch and no image size the grid stays, and the image grows with the patch.
        resize: how the projection gets another patch, "pinv" (FlexiViT) or "bicubic" (ViTDet).
        card: write a model card beside it (see ``write_card``).

    Raises:
        CheckpointError: unreadable source, something that the format has no place for, an ending that it does not
            have, a destination that exists, or weights that are no finite fractions.
        ConfigError: an image that is no whole number of patches.
    """
    if to not in FORMATS:
        raise CheckpointError(f"unknown format {to!r}; formats are: {', '.join(FORMATS)}")
    destination, format = Path(destination), FORMATS[to]
    _check_destination(destination, format, overwrite=overwrite)
    checkpoint = read_checkpoint(source)
    whole = checkpoint.tensors
    refuse_broken(encoder_state(whole), checkpoint.path)
    if encoder_only:
        checkpoint = replace(checkpoint, tensors=encoder_state(checkpoint.tensors))
    elif not format.decoder:
        without = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("decoder_")}
        checkpoint = replace(checkpoint, tensors=without)
    if patch_size or image_size:
        tensors, info = resize_encoder(
            checkpoint.tensors, checkpoint.info, patch_size=patch_size, image_size=image_size, method=resize
        )
        checkpoint = replace(checkpoint, tensors=tensors, info=info)
    exported = format.export(checkpoint.tensors, checkpoint.info)
    exported = replace(
        exported, left_out=exported.left_out + [name for name in whole if name not in checkpoint.tensors]
    )
    _write(destination, format, exported, checkpoint.info)
    written = write_card(destination, checkpoint, exported, format) if card else None
    return Conversion(checkpoint=checkpoint, destination=destination, left_out=exported.left_out, card=written)


def _check_destination(destination: Path, format: Format, *, overwrite: bool) -> None:
    if not format.endings:
        if destination.suffix in (".safetensors", ".pth", ".pt"):
            raise CheckpointError(f"{destination} should be a folder for format {format.name}, not a file's name")
        if destination.exists() and not destination.is_dir():
            raise CheckpointError(f"{destination} is a file and is left as it is; format {format.name} is a folder")
        there = [destination / name for name in ("config.json", "model.safetensors") if (destination / name).exists()]
    else:
        if destination.suffix not in format.endings:
            raise CheckpointError(f"{destination} should end in {_endings(format)} for format {format.name}")
        if destination.is_dir():
            raise CheckpointError(f"{destination} is a folder; give the name of a file")
        there = [destination] if destination.exists() else []
    if there and not overwrite:
        raise CheckpointError(f"{there[0]} exists and is left as it is; give another name, or --overwrite")


def _write(destination: Path, format: Format, exported: Exported, info: EncoderInfo) -> None:
    metadata = info.to_metadata() | ({"names": exported.names} if exported.names else {})
    for name, text in exported.files.items():
        with atomic_write(destination / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if not format.endings:
        write_safetensors(destination / "model.safetensors", exported.tensors, metadata)
    elif destination.suffix == ".safetensors":
        write_safetensors(destination, exported.tensors, metadata)
    else:
        tensors = {name: tensor.detach().clone() for name, tensor in exported.tensors.items()}
        write_torch(destination, {format.key: tensors, "metadata": metadata})


def _endings(format: Format) -> str:
    return " or ".join(format.endings) or "folder"


def main(argv: Sequence[str] | None = None) -> int:
    """``SRC DST --to FORMAT``, or ``--inspect SRC``."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of any supported family, or say what is in it.",
        epilog="formats: " + ", ".join(f"{name} ({_endings(format)})" for name, format in FORMATS.items()),
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="checkpoint file, run folder, Hugging Face folder, hf://owner/name[@revision][/file] or timm/name",
    )
    parser.add_argument("destination", metavar="DST", nargs="?", help="file to write, or folder for hf")
    parser.add_argument("--to", choices=list(FORMATS), help="format of DST")
    parser.add_argument("--inspect", action="store_true", help="print what SRC holds and write nothing")
    parser.add_argument("--json", action="store_true", help="with --inspect: as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--encoder-only", action="store_true", help="leave out decoder and heads")
    parser.add_argument("--patch-size", type=_size, metavar="P|HxW", help="take the projection to patches of P pixels")
    parser.add_argument("--resize", choices=METHODS, default="pinv", help="how: FlexiViT's or ViTDet's (%(default)s)")
    parser.add_argument("--image-size", type=_size, metavar="S|HxW", help="resize positions to images of this size")
    parser.add_argument("--no-card", dest="card", action="store_false", help="write no model card beside DST")
    args = parser.parse_args(argv)
    if args.inspect:
        return _inspect(args.source, as_json=args.json)
    if args.destination is None or args.to is None:
        parser.error("give SRC DST --to FORMAT, or --inspect SRC")
    done = convert(
        args.source,
        args.destination,
        args.to,
        overwrite=args.overwrite,
        encoder_only=args.encoder_only,
        patch_size=args.patch_size,
        image_size=args.image_size,
        resize=args.resize,
        card=args.card,
    )
    source = done.checkpoint
    print(f"{source.path} ({source.family}, {source.info.size}) -> {args.destination} ({args.to})")
    if done.left_out:
        print(f"  left out    {parts(done.left_out)}: {args.to} does not hold it")
    if done.card:
        print(f"  model card  {done.card} (licence: {source.info.license or 'unknown'})")
    return 0


def _inspect(source: str, *, as_json: bool) -> int:
    """Every checkpoint of a folder is looked at, whatever is wrong with another."""
    paths = checkpoints_of(source)
    failed, found = 0, []
    for path in paths:
        try:
            if as_json:
                found.append(examine(path))
            else:
                print(inspect(path))
        except CheckpointError as error:
            if len(paths) == 1:
                raise
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps(found[0] if len(paths) == 1 else found, indent=2))
    return EXIT_BAD_INPUT if failed else 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or not all(int(side or 1) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected 16 or 16x32 (height x width)")
    return int(match[1]), int(match[2] or match[1])
