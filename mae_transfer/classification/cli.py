"""The command line of ``tools/train_cls.py``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.dry_run import dry_run
from mae_transfer.classification.robustness import evaluate_checkpoint
from mae_transfer.classification.run import classify
from mae_transfer.engine.config import read_config, to_yaml
from mae_transfer.engine.distribution import processes
from mae_transfer.errors import EXIT_PREEMPTED

_EPILOG = """Every key of the config can be set as section.key=value, e.g.

  python tools/train_cls.py configs/classification/tiny_finetune.yaml init_checkpoint=runs/pretrain-tiny \\
      data.train=FOLDER/train data.val=FOLDER/val run.dir=runs/finetune
  torchrun --nproc-per-node 8 tools/train_cls.py configs/classification/base_finetune.yaml init_checkpoint=FILE …

--print-config lists them all. Exit status: 0 done, 1 the run failed, 2 bad input, 75 saved and stopped by a signal
(start again with run.resume=auto)."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="tools/train_cls.py",
        description="Classification with a pretrained encoder: protocol=finetune, partial, linear or knn.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("config", help="YAML file, such as configs/classification/tiny_finetune.yaml")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="set a key of the config")
    action = result.add_mutually_exclusive_group()
    action.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    action.add_argument(
        "--dry-run",
        action="store_true",
        help="take a few real steps, print size, memory, speed and time, write nothing",
    )
    action.add_argument(
        "--evaluate",
        metavar="CHECKPOINT",
        help="print the accuracy of a trained classifier (file or run folder) on data.val, which may hold any of its "
        "classes; several folders make a table",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 75 saved and stopped by a signal. Errors are raised."""
    arguments = parser().parse_intermixed_args(argv)
    config = read_config(ClassificationConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(to_yaml(config.resolved()))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    with processes(config.train.device) as group:
        if not group.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        if arguments.dry_run:
            report = dry_run(config, group)
            if group.is_main:
                print(report)
            return 0
        if arguments.evaluate is not None:
            report = evaluate_checkpoint(config, arguments.evaluate, group)
            if group.is_main:
                print(report)
            return 0
        stopped_by = classify(config, group)
    if stopped_by is not None:
        print(f"stopped by {stopped_by}, state saved; continue with run.resume=auto", file=sys.stderr)
        return EXIT_PREEMPTED
    return 0
