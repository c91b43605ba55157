"""The command line of ``tools/train_cls.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.dry_run import dry_run
from mae_transfer.classification.robustness import evaluate_checkpoint
from mae_transfer.classification.run import classify
from mae_transfer.engine.command import execute, run_parser
from mae_transfer.engine.config import read_config, to_yaml

_EPILOG = """Every key of the config can be set as section.key=value, e.g.

  python tools/train_cls.py configs/classification/tiny_finetune.yaml init_checkpoint=runs/pretrain-tiny \\
      data.train=FOLDER/train data.val=FOLDER/val run.dir=runs/finetune
  torchrun --nproc-per-node 8 tools/train_cls.py configs/classification/base_finetune.yaml init_checkpoint=FILE …

--print-config lists them all. Exit status: 0 done, 1 the run failed, 2 bad input, 75 saved and stopped by a signal
(start again with run.resume=auto)."""


def parser() -> argparse.ArgumentParser:
    result, _ = run_parser(
        prog="tools/train_cls.py",
        description="Classification with a pretrained encoder: protocol=finetune, partial, linear or knn.",
        epilog=_EPILOG,
        example="configs/classification/tiny_finetune.yaml",
        evaluate="print the accuracy of a trained classifier (file or run folder) on data.val, which may hold any of "
        "its classes; several folders make a table",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 75 saved and stopped by a signal. Errors are raised."""
    arguments = parser().parse_intermixed_args(argv)
    config = read_config(ClassificationConfig, arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(to_yaml(config.resolved()))
        return 0
    return execute(config, arguments, train=classify, dry_run=dry_run, evaluate=evaluate_checkpoint)
