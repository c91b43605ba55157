"""The command line of ``tools/compare_inits.py``."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mae_transfer.checkpoint.card import sha256
from mae_transfer.checkpoint.hub import is_address
from mae_transfer.checkpoint.read import resolve_path
from mae_transfer.errors import EXIT_PREEMPTED, CheckpointError, ConfigError
from mae_transfer.study.classification import ClassificationTask
from mae_transfer.study.compare import Init, Task, markdown, plan, run_all, write_results
from mae_transfer.study.detection import DetectionTask
from mae_transfer.study.jobs import claim
from mae_transfer.study.segmentation import SegmentationTask

_EPILOG = """\
Every training is a process of its own below OUT/runs. Give the same command again to go on after an interruption;
finished runs are kept. OUT then holds results.md, results.json and curves.png. For example:

  python tools/compare_inits.py detection --config-file configs/detection/tiny.py --out runs/compare \\
      --init pretrained=runs/mine/encoder.safetensors --init random --seeds 0 1 2 --fractions 0.25 1 --jobs 2 \\
      dataset.train.json=… dataset.train.images=… dataset.val.json=… dataset.val.images=… train.eval_period=100
"""


TASKS: Mapping[str, Callable[[Path, Sequence[str], Sequence[Init]], Task]] = {
    "detection": DetectionTask,
    "segmentation": SegmentationTask,
    "classification": ClassificationTask,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_inits.py",
        description="Train the same thing from several initial encoders and seeds, and compare what comes of it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task",
        choices=TASKS,
        help="detection: Mask R-CNN by tools/train_det.py, box and mask AP; "
        "segmentation: UperNet by tools/train_seg.py, mIoU; classification: tools/train_cls.py, top-1 and top-5",
    )
    parser.add_argument("--config-file", type=Path, required=True, metavar="FILE", help="the task's config")
    parser.add_argument(
        "--init",
        action="append",
        required=True,
        metavar="NAME=CHECKPOINT|random",
        help="a start: a name and its checkpoint (a file, a run folder, hf://owner/name), or random; once for each; "
        "the first is compared with the others",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="(default: 0 1 2)")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[1.0], metavar="F", help="shares of the labelled images"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where runs and results go")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each run (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config, for every run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run what is not finished, write what came of it; returns the exit status.

    Raises:
        UserError: bad input. RunFailed: a training failed.
    """
    args = build_parser().parse_intermixed_args(_overrides_last(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    if min(args.jobs, args.threads) < 1:
        raise ConfigError("--jobs and --threads are at least 1")
    if not args.config_file.is_file():
        raise ConfigError(f"config file {args.config_file} does not exist")
    inits, out = [parse_init(text) for text in args.init], args.out
    runs = plan(out, inits=inits, seeds=args.seeds, fractions=args.fractions)
    task = TASKS[args.task](args.config_file, args.overrides, inits)
    for run in {run.init.name: run for run in runs}.values():  # they differ in nothing else that could be wrong
        task.check(run)
    definition = {
        "task": args.task,
        "config_file": str(args.config_file),
        "config_sha256": sha256(args.config_file),
        "overrides": sorted(args.overrides),
        "threads": args.threads,
        "inits": {init.name: str(init.checkpoint) for init in inits},
        "init_sha256": {init.name: _digest(init) for init in inits},
        "seeds": args.seeds,
        "fractions": args.fractions,
    }
    claim(out, definition, what="comparison", may_grow=("inits", "init_sha256", "seeds", "fractions"))
    try:
        stopped_by = run_all(task, runs, jobs=args.jobs, threads=args.threads)
    finally:
        write_results(out, task, runs)
    if stopped_by is not None:
        print(f"stopped by {stopped_by}; give the same command again to go on")
        return EXIT_PREEMPTED
    print(markdown(task, runs), end="")
    print(f"{out / 'results.md'}, {out / 'curves.png'}")
    return 0


def _digest(init: Init) -> str:
    """Of the file that a start is read from; empty for random weights and for a folder of shards."""
    if init.checkpoint is None:
        return ""
    path = resolve_path(init.checkpoint)
    return sha256(path) if path.is_file() else ""


def _overrides_last(words: Sequence[str]) -> list[str]:
    """section.key=value behind everything else: after --seeds and the like they would be taken for more of those."""
    overrides = [
        word
        for before, word in zip(["", *words], words)
        if re.match(r"\w+(\.\w+)+=", word) and before not in ("--init", "--out", "--config-file")
    ]
    return [*(word for word in words if word not in overrides), *(["--", *overrides] if overrides else [])]


def parse_init(text: str) -> Init:
    """``NAME=CHECKPOINT`` or ``random``."""
    name, equals, path = text.partition("=")
    if text == "random":
        return Init(name="random", checkpoint=None)
    if not equals or not path or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            f"--init {text}: expected random, or NAME=CHECKPOINT with a name of letters, digits, '.', '_' and '-'"
        )
    if not is_address(path) and not Path(path).exists():
        raise CheckpointError(f"--init {text}: {path} does not exist")
    return Init(name=name, checkpoint=Path(path))
