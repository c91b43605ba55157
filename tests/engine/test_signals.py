"""Data workers outlive a cluster's signal and do not outlive their main process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, IterableDataset

from mae_transfer.engine.signals import ignore_stop_signals


class Endless(IterableDataset[int]):
    """Its items are the worker's process number."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield os.getpid()


def test_a_foreign_signal_does_not_end_a_worker() -> None:
    batches = iter(DataLoader(Endless(), num_workers=1, batch_size=None, worker_init_fn=ignore_stop_signals))
    worker = next(batches)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(worker)], check=True)  # not from its parent
    time.sleep(0.2)
    assert {next(batches) for _ in range(20)} == {worker}


LEAVING = """
from torch.utils.data import DataLoader
from mae_transfer.engine.signals import ignore_stop_signals
from tests.engine.test_signals import Endless

if __name__ == "__main__":
    batches = iter(DataLoader(Endless(), num_workers=1, batch_size=None, worker_init_fn=ignore_stop_signals))
    next(batches)
    {leave}
"""


@pytest.mark.parametrize("leave", ["pass", "raise KeyError('a defect, whose traceback keeps the loader alive')"])
def test_a_main_process_that_leaves_takes_its_workers_along(leave: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVING.format(leave=leave)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == (0 if leave == "pass" else 1), done.stderr
