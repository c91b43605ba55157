"""SIGTERM and SIGUSR1: finish the step, save, leave. What a cluster sends before it takes the machine away."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, notes the signals instead of dying of them."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def ignore_stop_signals(worker: int = 0) -> None:
    """For data workers: a cluster signals every process of a job, and the main one still needs its workers to finish
    the step. The main process's own SIGTERM, with which it ends its workers when it leaves, is obeyed: were it ignored
    too, a main process that leaves without shutting its loader down would wait for its workers for ever."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_obey_main_process, args=(os.getppid(),), daemon=True).start()


def _obey_main_process(main: int) -> None:
    """Wait for the blocked signals; only here is it known who sent them."""
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != main:
        pass
    os._exit(0)
