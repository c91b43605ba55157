"""Write a network as ONNX or torch.export, whichever framework trains it: what ``tools/export.py`` runs."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from mae_transfer.errors import ConfigError
from mae_transfer.predict import recognise

_DETECTION = ("detectron2", "mae_transfer.detection")  # what a LazyConfig imports, if not from a file beside it

_DESCRIPTION = """\
Write a network as ONNX or torch.export and compare it with PyTorch. Input: RGB pixels (N, 3, H, W), 0 to 255; the
normalisation is inside.
Of a segmentation model, all of it: the output is the logits (N, classes, H, W) of one window.
Of a detector, backbone and pyramid: the heads stay with Detectron2, whose proposals and boxes torch.export cannot
follow.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, recognise what is to be exported, and let its room write it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_OR_CONFIG", help="a run's folder, a .pth in it, or a config .py")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .onnx or .pt2 (torch.export)")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels; by default those of training's crops"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of a config")
    args = parser.parse_intermixed_args(argv)
    if kind_of(args.run) == "detection":
        from mae_transfer.detection.export import export_run
    else:
        from mae_transfer.segmentation.export import export_run
    size = (args.image_size[0], args.image_size[1]) if args.image_size else None
    print(export_run(args.run, args.out, image_size=size, overwrite=args.overwrite, overrides=args.overrides))
    return 0


def kind_of(run: str) -> str:
    """ "detection" or "segmentation", of a run or of a config: Detectron2's LazyConfigs import, MMEngine's inherit.

    Raises:
        CheckpointError: no run of these two kinds.
        ConfigError: a config that is not there, or is not Python.
    """
    path = Path(run)
    if path.suffix != ".py":
        return recognise(path)[0]
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    lazy = any(node.level or (node.module or "").startswith(_DETECTION) for node in imported)
    return "detection" if lazy else "segmentation"
