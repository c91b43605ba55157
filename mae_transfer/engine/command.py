"""What the command lines of pretraining and classification have in common."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from mae_transfer.engine.distribution import Processes, processes
from mae_transfer.errors import EXIT_PREEMPTED

ConfigT = TypeVar("ConfigT", bound=Any)


def run_parser(
    *, prog: str, description: str, epilog: str, example: str, evaluate: str
) -> tuple[argparse.ArgumentParser, Any]:
    """A parser of a config, its overrides and what to do with them; and the group that further actions may join.

    Args:
        example: a config file.
        evaluate: help of ``--evaluate``.
    """
    result = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("config", help=f"YAML file, such as {example}")
    result.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="set a key of the config; section=null drops what the file says of a section",
    )
    action = result.add_mutually_exclusive_group()
    action.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    action.add_argument(
        "--dry-run",
        action="store_true",
        help="take a few real steps, print size, memory, speed and time, write nothing",
    )
    action.add_argument("--evaluate", metavar="CHECKPOINT", help=evaluate)
    return result, action


def execute(
    config: ConfigT,
    arguments: argparse.Namespace,
    *,
    train: Callable[[ConfigT, Processes], str | None],
    dry_run: Callable[[ConfigT, Processes], str],
    evaluate: Callable[[ConfigT, str, Processes], str],
) -> int:
    """Train, rehearse or evaluate, on as many processes as torchrun has started.

    Returns:
        Exit status: 0 done, 75 saved and stopped by a signal. Errors are raised.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    with processes(config.train.device) as group:
        if not group.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        if arguments.dry_run or arguments.evaluate is not None:
            report = dry_run(config, group) if arguments.dry_run else evaluate(config, arguments.evaluate, group)
            if group.is_main:
                print(report)
            return 0
        stopped_by = train(config, group)
    if stopped_by is not None:
        print(f"stopped by {stopped_by}, state saved; continue with run.resume=auto", file=sys.stderr)
        return EXIT_PREEMPTED
    return 0
