"""``tools/test_seg.py``: sliding-window test of a trained model, with MMSegmentation's flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DefaultScope

from mae_transfer.segmentation.config import load_config, process_count
from mae_transfer.segmentation.processes import joined
from mae_transfer.segmentation.runner import SegmentationRunner, load_weights
from mae_transfer.segmentation.train import add_common_flags, check_folder_of, is_main


def build_parser() -> argparse.ArgumentParser:
    """The command line of test_seg."""
    parser = argparse.ArgumentParser(prog="test_seg.py", description="Test a segmentation model: mIoU and overlays.")
    parser.add_argument("config", help="the config it was trained with: the .py in its work dir, or a shipped one")
    parser.add_argument("checkpoint", help="a .pth that train_seg wrote")
    parser.add_argument("--work-dir", help="where logs and predictions/ go; CHECKPOINT's folder + /test by default")
    parser.add_argument("--out", metavar="DIR", help="write predictions as index PNGs, numbered as index masks are")
    parser.add_argument("--show-dir", metavar="DIR", help="write an overlay of every image, there")
    parser.add_argument("--tta", action="store_true", help="average over test.scales and flips (test.tta)")
    add_common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Test on the validation split and print the metrics.

    Raises:
        UserError: bad input.
    """
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    work_dir = arguments.work_dir or str(Path(arguments.checkpoint).parent / "test")
    config = load_config(
        arguments.config,
        arguments.cfg_options,
        work_dir=work_dir,
        num_processes=process_count(arguments.launcher),
        for_training=False,
    )
    config.launcher = arguments.launcher
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # here: the metric's first process makes it too late
        config.test_evaluator.output_dir = arguments.out
    overlays = arguments.show_dir or f"{work_dir}/predictions"
    if arguments.show_dir:
        (pictures,) = (hook for hook in config.custom_hooks if hook.type == "PredictionPictures")
        pictures.update(folder=overlays, count=None)
    check_folder_of(config, "test")
    metrics = run_test(config, arguments.checkpoint, tta=arguments.tta or config.settings.test.tta)
    if is_main():
        print(", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if not name.endswith("time")))
        print(f"overlays are in {overlays}" + (f", labels in {arguments.out}" if arguments.out else ""))
    return 0


def run_test(config: Config, checkpoint: str | Path, *, tta: bool = False) -> dict[str, float]:
    """Test a complete config with a checkpoint's weights; returns MMSegmentation's metrics.

    Raises:
        CheckpointError: the checkpoint is not of the config's model.
    """
    config.model.backbone.init_checkpoint = None  # its weights come with the checkpoint
    if tta:
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
        config.model = {**config.tta_model, "module": config.model}
    config.distributed = "ddp"  # inference needs no shards
    with DefaultScope.overwrite_default_scope("mmseg"), joined(config.launcher):
        runner = SegmentationRunner.from_cfg(config)
        model = runner.module
        load_weights(model.module if tta else model, checkpoint)
        return runner.test()
