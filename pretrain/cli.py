"""The command line of ``tools/pretrain.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mae_transfer.engine.command import execute, run_parser
from mae_transfer.engine.config import read_config, to_yaml
from pretrain.config import PretrainConfig
from pretrain.dry_run import dry_run
from pretrain.evaluate import evaluate_checkpoint
from pretrain.planner import parse_plan, plan
from pretrain.run import pretrain

_EPILOG = """Every key of the config can be set as section.key=value, e.g.

  python tools/pretrain.py configs/pretrain/tiny.yaml data.path=FOLDER run.dir=runs/mine train.epochs=100
  torchrun --nproc-per-node 8 tools/pretrain.py configs/pretrain/base_800ep.yaml data.path=FOLDER run.dir=runs/base

--print-config lists them all. Exit status: 0 done, 1 the run failed, 2 bad input, 75 saved and stopped by a signal
(start again with run.resume=auto)."""


def parser() -> argparse.ArgumentParser:
    result, action = run_parser(
        prog="tools/pretrain.py",
        description="Masked-autoencoder pretraining on folders of images.",
        epilog=_EPILOG,
        example="configs/pretrain/tiny.yaml",
        evaluate="print the loss of a checkpoint on the images of data.val_path, and what needs no learning beside it; "
        "mask.*, run.seed and log.evaluate_images are taken from the config",
    )
    action.add_argument(
        "--plan",
        nargs="+",
        metavar="KEY=VALUE",
        help="gpus=64 kind=h100: print memory a GPU and hours by formula, for this config and ViT-B, L and H; starts "
        "nothing and needs no data",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 75 saved and stopped by a signal. Errors are raised."""
    arguments = parser().parse_intermixed_args(argv)
    # Keys of the config may follow the plan's own, which have no section.
    planned = [part for part in arguments.plan or () if "." not in part.partition("=")[0]]
    overrides = arguments.overrides + [part for part in arguments.plan or () if part not in planned]
    config = read_config(PretrainConfig, arguments.config, overrides)
    if arguments.print_config:
        sys.stdout.write(to_yaml(config.resolved()))
        return 0
    if arguments.plan is not None:
        print(plan(config, **parse_plan(planned)))
        return 0
    return execute(config, arguments, train=pretrain, dry_run=dry_run, evaluate=evaluate_checkpoint)
