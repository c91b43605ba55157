"""``tools/train_seg.py``: MMSegmentation's flags, our settings."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import ConfigError
from mae_transfer.segmentation.check import check_folder
from mae_transfer.segmentation.config import load_config, process_count
from mae_transfer.segmentation.processes import joined
from mae_transfer.segmentation.runner import SegmentationRunner
from mae_transfer.segmentation.source import Split

_TIMESTAMP = re.compile(r"\d{8}_\d{6}")

OPTIONS_HELP = (
    "settings such as dataset.root=DIR dataset.classes=FILE dataset.reduce_zero_label=True dataset.crop_size=512 "
    "init_checkpoint=encoder.safetensors train.max_iters=160000 train.batch_size=16 train.seed=0, from which the "
    "config is derived, or keys of the derived config such as model.decode_head.dropout_ratio=0"
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of train_seg."""
    parser = argparse.ArgumentParser(prog="train_seg.py", description="Train UperNet on an MAE encoder.")
    parser.add_argument("config", help="config file, such as configs/segmentation/upernet_tiny.py")
    parser.add_argument("--work-dir", help="where logs, checkpoints and pictures go; work_dirs/CONFIG by default")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the work dir")
    parser.add_argument("--amp", action="store_true", help="mixed precision: train.precision=bf16 where it is fp32")
    parser.add_argument("--print-config", action="store_true", help="print the complete config and stop")
    add_common_flags(parser)
    return parser


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that training and testing share, as MMSegmentation names them."""
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="K=V", help=OPTIONS_HELP)
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, validating on the way.

    Raises:
        UserError: bad input.
        RunFailed: the loss left the finite numbers.
        SystemExit: 75, having saved on SIGTERM or SIGUSR1.
    """
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    work_dir = arguments.work_dir or f"work_dirs/{Path(arguments.config).stem}"
    config = load_config(
        arguments.config,
        arguments.cfg_options,
        work_dir=work_dir,
        num_processes=process_count(arguments.launcher),
        amp=arguments.amp,
    )
    if arguments.print_config:
        print(config.pretty_text)
        return 0
    config.launcher = arguments.launcher
    config.resume = arguments.resume
    lines: list[str] = []
    with ExitStack() as held:
        if is_main():
            refuse_used_folder(Path(work_dir), resume=arguments.resume)
            lines = [check_folder_of(config, split) for split in ("train", "val")]
            lines += describe_weights(config)
            Path(work_dir).mkdir(parents=True, exist_ok=True)
            held.enter_context(RunFolder(work_dir, key="--work-dir").in_use())
        runner = train(config, lines)
        info = runner.message_hub.runtime_info
        if is_main():
            said = f", best mIoU {info['best_score']:.2f}" if "best_score" in info else ""
            print(f"trained {runner.iter} iterations{said}; checkpoints, metrics and predictions/ are in {work_dir}")
    return 0


def train(config: Config, log_lines: Sequence[str] = ()) -> SegmentationRunner:
    """Run the training of a complete config and return the runner behind it."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    with DefaultScope.overwrite_default_scope("mmseg"), StopRequest() as stop_request, joined(config.launcher):
        runner = SegmentationRunner.from_cfg(config)
        runner.stop_request = stop_request
        for line in log_lines:
            print_log(line, logger="current")
        runner.train()
    return runner


def describe_weights(config: Config) -> list[str]:
    """A line of the weights that the classes were given for their shares of the pixels, where they were."""
    weights = config.facts.class_weights
    if weights is None:
        return []
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(config.facts.classes, weights, strict=True))
    return [f"class weights, 1/ln(1.02 + share of the training pixels), by their mean over pixels: {shown}"]


def is_main() -> bool:
    """Whether this process is the first of its launch, before MMEngine has set the others up."""
    return os.environ.get("RANK", "0") == "0"


def check_folder_of(config: Config, which: str) -> str:
    """Check the "train" or "val" split of the config's data set; returns a line for the log."""
    entry = config[f"{which}_dataloader"].dataset
    return check_folder(Split(**{key.name: entry[key.name] for key in fields(Split)}), entry.classes)


def refuse_used_folder(folder: Path, *, resume: bool) -> None:
    """A run does not mix its files with another's.

    Raises:
        ConfigError: the folder holds something and the run does not continue what is there, or a run is writing to it.
    """
    if folder.is_file():
        raise ConfigError(f"--work-dir {folder} is a file; name a folder")
    RunFolder(folder, key="--work-dir").check_free()
    if not resume and folder.is_dir() and not _is_unborn(folder):
        raise ConfigError(
            f"--work-dir {folder} is not empty; give --resume to continue that run, or name another folder"
        )


def _is_unborn(folder: Path) -> bool:
    """Whether there is nothing but what a run leaves that was refused before its first iteration: MMEngine's folders
    of logs, and the config."""
    started = False
    for path in folder.iterdir():
        if path.is_dir() and _TIMESTAMP.fullmatch(path.name):
            started = True
        elif path.name != ".in-use" and path.suffix != ".py":
            return False
    return started or not any(folder.glob("*.py"))
