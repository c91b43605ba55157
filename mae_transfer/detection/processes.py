"""One process or several, on one machine or several, by Detectron2's launch, with exit statuses that mean something."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.engine import launch
from torch.multiprocessing.spawn import ProcessExitedException

from mae_transfer.engine.signals import STOP_SIGNALS
from mae_transfer.errors import RunFailed, run_tool


def launch_processes(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    per_machine: int,
    machines: int,
    machine: int,
    url: str,
) -> None:
    """Call ``function`` in every process of a run; returns when all have ended well.

    Args:
        machine: number of this machine, from 0.
        url: where processes meet; "auto" on one machine.

    Raises:
        RunFailed: a process was killed.
        SystemExit: with the status of a process that ended itself, which has said why.
    """
    if per_machine * machines == 1:
        function(*arguments)
        return
    try:
        with _passing_signals_on():
            launch(
                _call,
                per_machine,
                num_machines=machines,
                machine_rank=machine,
                dist_url=url,
                args=(function, arguments),
            )
    except ProcessExitedException as error:
        if error.exit_code > 0:
            raise SystemExit(error.exit_code) from None
        raise RunFailed(
            f"process {error.error_index} was killed ({error.signal_name}) and the others were ended; --resume goes on "
            "from the last checkpoint"
        ) from error


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In a process of several: what a user caused is a line here too, not a traceback passed on to the parent."""
    status = run_tool(lambda _: function(*arguments))
    if status:
        sys.exit(status)


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """A scheduler may signal the parent alone; it is the children that save."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
