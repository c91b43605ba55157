"""Predict with a finished run, whichever framework trained it: what ``tools/predict.py`` runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mae_transfer.data.source import scan_folders
from mae_transfer.errors import CheckpointError, ConfigError, DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, recognise the run, and let the room that trained it predict; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Predict on images with a trained detection or segmentation run; writes overlays and results.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER|CHECKPOINT", help="a run's folder, or a .pth inside it")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE|DIR", help="images, or folders of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where overlays and results go")
    parser.add_argument(
        "--min-score", type=float, default=0.5, metavar="S", help="detection: lowest score that is drawn (default 0.5)"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.min_score <= 1:
        raise ConfigError(f"--min-score {args.min_score}: expected a score between 0 and 1")
    kind, folder, checkpoint = recognise(args.run)
    images = find_images(args.images)
    if kind == "detection":
        from mae_transfer.detection.predict import predict_images as detect

        detect(folder, checkpoint, images, args.out, min_score=args.min_score)
    else:
        from mae_transfer.segmentation.predict import predict_images as segment

        segment(folder, checkpoint, images, args.out)
    print(f"{len(images)} images, {kind}: {args.out}")
    return 0


def recognise(run: Path) -> tuple[str, Path, Path | None]:
    """("detection" | "segmentation", the run's folder, the checkpoint named or None for the run's last).

    Detection runs keep a ``config.yaml`` that names its model; segmentation runs keep mmengine's dumped ``.py``.

    Raises:
        CheckpointError: nothing there, or no run of these two kinds.
    """
    if not run.exists():
        raise CheckpointError(f"{run} does not exist; name a run folder or a checkpoint in one")
    folder, checkpoint = (run, None) if run.is_dir() else (run.parent, run)
    config = folder / "config.yaml"
    if config.is_file() and "mae_transfer.detection." in config.read_text(encoding="utf-8"):
        return "detection", folder, checkpoint
    if any(folder.glob("*.py")):
        return "segmentation", folder, checkpoint
    if config.is_file():
        raise CheckpointError(
            f"{folder} is a pretraining or classification run; see tools/reconstruct.py for the first"
        )
    raise CheckpointError(f"{folder} holds no config of a detection or segmentation run beside its checkpoints")


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The images named, and those below the folders named, in order.

    Raises:
        DataError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += scan_folders([path])
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"image {path} does not exist")
    return found
