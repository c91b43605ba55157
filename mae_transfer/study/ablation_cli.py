"""The command line of ``tools/study.py``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from mae_transfer.errors import EXIT_PREEMPTED, ConfigError, DataError
from mae_transfer.study.ablation import Study, write_results
from mae_transfer.study.axes import AXES, EVALUATIONS
from mae_transfer.study.jobs import claim, run_jobs

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_EPILOG = """\
Every training is a process of its own below OUT and is made once, whichever axes share it. Give the same command
again to go on after an interruption. OUT then holds AXIS.md, AXIS.json and AXIS.png for every axis that was run.
For example:

  python tools/study.py ratio --images data/unlabelled --train data/train --val data/val --out runs/study --jobs 2
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="study.py",
        description="The MAE paper's ablations at small scale: pretrain, then judge by linear probe and fine-tuning.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "axis", choices=AXES, help="; ".join(f"{axis.name}: {axis.title} ({axis.source})" for axis in AXES.values())
    )
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="unlabelled images to pretrain on")
    parser.add_argument("--train", type=Path, required=True, metavar="FOLDER", help="labelled images, a folder a class")
    parser.add_argument("--val", type=Path, required=True, metavar="FOLDER", help="labelled images to be judged by")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where trainings and results go")
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="S", help="(default: 0 1 2 for ratio and masking, 0 for the others)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each training (default: 1)")
    parser.add_argument("--results", action="store_true", help="train nothing; write the results of what is finished")
    parser.add_argument(
        "--pretrain-config",
        type=Path,
        default=_CONFIGS / "pretrain" / "study.yaml",
        metavar="FILE",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--classify-configs",
        type=Path,
        default=_CONFIGS / "classification",
        metavar="FOLDER",
        help="where study_linear.yaml and study_finetune.yaml are (%(default)s)",
    )
    for what in ("pretrain", "classify"):
        parser.add_argument(
            f"--{what}-set",
            action="append",
            default=[],
            metavar="key=value",
            help=f"a setting over --{what}-config{'s' * (what == 'classify')}, for every such training; once for each",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run what is not finished, write what came of it; returns the exit status.

    Raises:
        UserError: bad input. RunFailed: a training failed.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    axis = AXES[args.axis]
    seeds = list(range(axis.seeds)) if args.seeds is None else args.seeds
    _check(args, seeds)
    study = Study(
        out=args.out,
        images=args.images,
        train=args.train,
        val=args.val,
        pretrain_config=args.pretrain_config,
        classify_configs=args.classify_configs,
        pretrain_settings=tuple(args.pretrain_set),
        classify_settings=tuple(args.classify_set),
    )
    study.check(axis)
    claim(args.out, study.definition, what="study")
    stopped_by = None
    try:
        if not args.results:
            stopped_by = run_jobs(study.jobs(axis, seeds), at_a_time=args.jobs, threads=args.threads)
    finally:
        text = write_results(study, axis, seeds)
    if stopped_by is not None:
        print(f"stopped by {stopped_by}; give the same command again to go on")
        return EXIT_PREEMPTED
    print(text, end="")
    print(f"{args.out / f'{axis.name}.md'}, {args.out / f'{axis.name}.png'}")
    return 0


def _check(args: argparse.Namespace, seeds: Sequence[int]) -> None:
    if min(args.jobs, args.threads) < 1:
        raise ConfigError("--jobs and --threads are at least 1")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds has a value twice: {' '.join(map(str, seeds))}")
    for key in ("images", "train", "val"):
        if not (folder := getattr(args, key)).exists():
            raise DataError(f"--{key} {folder} does not exist")
    for option, file in (
        ("--pretrain-config", args.pretrain_config),
        *(("--classify-configs", args.classify_configs / how.config) for how in EVALUATIONS),
    ):
        if not file.is_file():
            raise ConfigError(f"{option}: {file} does not exist")
