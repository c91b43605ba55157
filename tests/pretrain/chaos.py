"""Kill a run again and again, then compare it with one that was left alone.

    python -m tests.pretrain.chaos --kills 20 --out /tmp/chaos -- configs/pretrain/tiny.yaml data.path=FOLDER \
        train.steps=300 checkpoint.every_steps=10

Every other death is kill -9, the others SIGTERM. The moments are random, but for every other kill -9, which waits until
a checkpoint is being written. Exit status 0 when metrics and weights of the two runs are equal to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.pretrain.small import children, timeless

TOOL = str(Path(__file__).parents[2] / "tools" / "pretrain.py")


@dataclass
class Deaths:
    """What happened to the run."""

    killed: int = 0
    terminated: int = 0
    while_saving: int = 0
    steps: list[int] = field(default_factory=list)  # lines of metrics at each death

    @property
    def count(self) -> int:
        return self.killed + self.terminated


def torment(arguments: Sequence[str], run: Path, *, kills: int, seed: int, processes: int = 1) -> Deaths:
    """Start the run, kill it, start it again … until it has died ``kills`` times; then let it finish.

    Raises:
        AssertionError: a start ended otherwise than by the signal, or the run was over before the last death.
    """
    draw = random.Random(seed)
    deaths = Deaths()
    while deaths.count < kills:
        process = start([*arguments, f"run.dir={run}", "run.resume=auto"], processes)
        saving = deaths.count % 4 == 2
        terminate = deaths.count % 2 == 1
        began = lines(run)
        # A moment from the very start (imports) to well into training.
        deadline = time.monotonic() + draw.uniform(0.5, 6.0)
        if saving or draw.random() < 0.8:  # most deaths come after some new steps, some before
            wanted = began + draw.randrange(1, 40)
            wait(process, lambda wanted=wanted: lines(run) >= wanted)  # type: ignore[misc]
        else:
            wait(process, lambda deadline=deadline: time.monotonic() > deadline)  # type: ignore[misc]
        if saving:
            wait(process, partial(frozen_while_saving, process.pid, run))
        if process.poll() is not None:
            raise AssertionError(f"over after {deaths.count} deaths: {process.communicate()[1]}")
        if terminate:
            process.terminate()
        else:
            signal_all(process.pid, signal.SIGKILL)
        errors = process.communicate(timeout=300)[1]
        if terminate and processes == 1 and process.returncode not in (75, -signal.SIGTERM):
            raise AssertionError(f"status {process.returncode} after SIGTERM: {errors}")
        deaths.terminated += terminate
        deaths.killed += not terminate
        deaths.while_saving += saving and is_saving(run)
        deaths.steps.append(lines(run))
    finish([*arguments, f"run.dir={run}", "run.resume=auto"], processes)
    return deaths


def start(arguments: Sequence[str], processes: int) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), TOOL, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*"))


def frozen_while_saving(process: int, run: Path) -> bool:
    """Stop the processes as soon as they save, and say whether they still did when they stood still."""
    if not is_saving(run):
        return False
    signal_all(process, signal.SIGSTOP)
    if is_saving(run):
        return True
    signal_all(process, signal.SIGCONT)
    return False


def signal_all(process: int, number: signal.Signals) -> None:
    """To a process and its children: torchrun's live in sessions of their own and would go on without it."""
    for one in (process, *children(process)):
        with suppress(ProcessLookupError):
            os.kill(one, number)


def finish(arguments: Sequence[str], processes: int = 1) -> None:
    process = start(arguments, processes)
    errors = process.communicate()[1]
    if process.returncode != 0:
        raise AssertionError(errors)


def wait(process: subprocess.Popen[str], condition: object) -> None:
    assert callable(condition)
    while process.poll() is None and not condition():
        time.sleep(0.002)


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two finished runs; nothing but what a clock says may."""
    found = []
    ours, theirs = timeless(one / "metrics.jsonl"), timeless(two / "metrics.jsonl")
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} and {len(theirs)} lines of metrics")
    found += [f"step {a['step']}: {a} and {b}" for a, b in zip(ours, theirs, strict=False) if a != b][:3]
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    found += [f"weights of {name}" for name in a if not torch.equal(a[name], b[name])][:3]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    calm = given.out / "calm"
    finish([*given.arguments, f"run.dir={calm}"], given.processes)
    killed = given.out / "killed"
    deaths = torment(given.arguments, killed, kills=given.kills, seed=given.seed, processes=given.processes)
    print(
        f"{deaths.killed} x kill -9 ({deaths.while_saving} of them while a checkpoint was written), "
        f"{deaths.terminated} x SIGTERM, at steps {deaths.steps}"
    )
    found = differences(killed, calm)
    print("\n".join(found) or f"equal to the last bit: {lines(calm)} lines of metrics and all weights")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
