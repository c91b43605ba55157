"""Predict with a finished run, whichever framework trained it: what ``tools/predict.py`` runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mae_transfer.data.source import scan_folders
from mae_transfer.errors import CheckpointError, ConfigError, DataError

_DETECTION = ("min_score", "json")
_SEGMENTATION = ("tta", "config", "cfg_options")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, recognise the run, and let the room that trained it predict; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="predict.py",
        description="Predict on images with a trained detection or segmentation run; writes overlays and results.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER|CHECKPOINT", help="a run's folder, or a .pth inside it")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE|DIR", help="images, or folders of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where overlays and results go")
    parser.add_argument("--device", metavar="D", help="auto, cpu or cuda (default auto: a GPU where there is one)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images computed together (default 1)")
    detection = parser.add_argument_group("of detection runs")
    detection.add_argument("--min-score", type=float, metavar="S", help="lowest score that is drawn (default 0.5)")
    detection.add_argument(
        "--json", type=Path, metavar="FILE", help="COCO json that lists the images: results carry its image ids"
    )
    segmentation = parser.add_argument_group("of segmentation runs")
    segmentation.add_argument(
        "--tta", action="store_true", default=None, help="average over scales and mirrored images"
    )
    segmentation.add_argument(
        "--config", type=Path, metavar="PY", help="the config of a CHECKPOINT that lies without its run"
    )
    segmentation.add_argument(
        "--cfg-options",
        nargs="+",
        metavar="K=V",
        help="over the config, such as dataset.classes=FILE test.window_batch=8",
    )
    args = parser.parse_args(argv)
    if args.config is not None:
        if not args.run.is_file():
            raise ConfigError(f"--config is for a checkpoint without its run; {args.run} is no file")
        kind, folder, checkpoint = "segmentation", args.run, None
    else:
        kind, folder, checkpoint = recognise(args.run)
    foreign = _SEGMENTATION if kind == "detection" else _DETECTION
    given = [name for name in foreign if getattr(args, name) is not None]
    if given:
        other = "segmentation" if kind == "detection" else "detection"
        raise ConfigError(f"--{given[0].replace('_', '-')} is for {other} runs; {args.run} is a {kind} run")
    images = find_images(args.images)
    if kind == "detection":
        from mae_transfer.detection.predict import predict_images as detect

        detect(
            folder,
            checkpoint,
            images,
            args.out,
            min_score=0.5 if args.min_score is None else args.min_score,
            device=args.device or "auto",
            batch_size=args.batch_size,
            json_file=args.json,
        )
    else:
        from mae_transfer.segmentation.predict import predict_images as segment

        segment(
            folder,
            checkpoint,
            images,
            args.out,
            config=args.config,
            options=args.cfg_options,
            device=args.device or "auto",
            batch_size=args.batch_size,
            tta=args.tta,
        )
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
