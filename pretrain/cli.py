"""The command line of ``tools/pretrain.py``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from mae_transfer.engine.config import read_config, to_yaml
from mae_transfer.engine.distribution import processes
from mae_transfer.errors import EXIT_PREEMPTED
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
    result = argparse.ArgumentParser(
        prog="tools/pretrain.py",
        description="Masked-autoencoder pretraining on folders of images.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("config", help="YAML file, such as configs/pretrain/tiny.yaml")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="set a key of the config")
    action = result.add_mutually_exclusive_group()
    action.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    action.add_argument(
        "--dry-run",
        action="store_true",
        help="take a real step, print size, memory, speed and time, write nothing",
    )
    action.add_argument(
        "--plan",
        nargs="+",
        metavar="KEY=VALUE",
        help="gpus=64 kind=h100: print memory a GPU and hours by formula, for this config and ViT-B, L and H; starts "
        "nothing and needs no data",
    )
    action.add_argument(
        "--evaluate",
        metavar="CHECKPOINT",
        help="print the loss of a checkpoint on the images of data.val_path, and what needs no learning beside it; "
        "mask.*, run.seed and log.evaluate_images are taken from the config",
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
        stopped_by = pretrain(config, group)
    if stopped_by is not None:
        print(f"stopped by {stopped_by}, state saved; continue with run.resume=auto", file=sys.stderr)
        return EXIT_PREEMPTED
    return 0
