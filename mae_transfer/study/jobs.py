"""Trainings as processes of their own: several at a time, in order, resumed rather than repeated."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mae_transfer.engine.files import write_text
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import ConfigError, RunFailed

logger = logging.getLogger(__name__)

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training in a folder of its own.

    Attributes:
        title: how it is called in the log.
        command: arguments for Python that start it, or take it up where it stopped.
        is_finished: nothing of it is left to do.
        after: trainings that have to be finished before it starts.
    """

    title: str
    folder: Path
    command: Callable[[], list[str]] = field(repr=False)
    is_finished: Callable[[], bool] = field(repr=False)
    after: Sequence[Job] = ()

    @property
    def log(self) -> Path:
        """Where its output goes: beside its folder."""
        return self.folder.with_name(self.folder.name + ".log")


def claim(out: Path, definition: Mapping[str, Any], *, what: str, may_grow: Sequence[str] = ()) -> None:
    """Make ``out`` the folder of a comparison or a study, or make sure that it is: ``WHAT.json`` in it says of which.

    Args:
        definition: what its trainings have in common, as JSON values.
        what: "comparison" or "study".
        may_grow: keys of lists and mappings to which more may be added later; a name in a mapping keeps its value.

    Raises:
        ConfigError: it is another one's, or holds something else.
    """
    path = out / f"{what}.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {before.get(key)}, is {value}"
            for key, value in definition.items()
            if key not in may_grow and before.get(key) != value
        ]
        for key in may_grow:
            if isinstance(now := definition[key], Mapping):
                names = [name for name in now if before[key].get(name, now[name]) != now[name]]
                changed += [f"{key} {name} was {before[key][name]}, is {now[name]}" for name in names]
        if changed:
            raise ConfigError(f"{out} holds another {what}: {'; '.join(changed)}. Choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and holds no {what}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(definition, indent=1) + "\n")


def run_jobs(jobs: Sequence[Job], *, at_a_time: int, threads: int) -> str | None:
    """Run what is not finished, ``at_a_time`` together with ``threads`` threads each, in the order given as far as
    what each waits for allows.

    Returns:
        None, or the name of the signal that stopped it; the trainings then have saved and stopped too.

    Raises:
        RunFailed: a training failed; the others that were running have finished.
    """
    waiting = [job for job in jobs if not job.is_finished()]
    if len(waiting) < len(jobs):
        logger.info("%d of %d runs are finished already", len(jobs) - len(waiting), len(jobs))
    going: list[_Process] = []
    failed: Job | None = None
    with StopRequest() as stop:
        try:
            while going or (waiting and failed is None and stop.received is None):
                while len(going) < at_a_time and failed is None and stop.received is None:
                    ready = next((job for job in waiting if all(before.is_finished() for before in job.after)), None)
                    if ready is None:
                        break
                    waiting.remove(ready)
                    going.append(_Process(ready, threads))
                    logger.info("%s: %s", ready.title, ready.log)
                if not going:
                    assert failed is not None or stop.received is not None, "a job waits for one that is not among them"
                time.sleep(0.2)
                if stop.received is not None:
                    for process in going:
                        process.stop()
                for process in [process for process in going if process.ended]:
                    going.remove(process)
                    if process.close() == 0 and process.job.is_finished():
                        logger.info("%s: done in %s", process.job.title, minutes(seconds_of(process.job.folder)))
                    elif stop.received is None:
                        failed = process.job
        finally:
            for process in going:  # something unforeseen: leave nothing behind
                process.stop()
                process.close()
    if failed is not None:
        tail = "\n".join(failed.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RunFailed(f"{failed.title}: the training failed. The end of {failed.log}:\n{tail}")
    return stop.received


class _Process:
    """A training that is going on."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job = job
        self.begin = time.monotonic()
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        self.stream: IO[str] = job.log.open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, *job.command()],
            stdout=self.stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.told = False

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Ask it to save and to leave."""
        if not self.told and not self.ended:
            self.process.send_signal(signal.SIGTERM)
            self.told = True

    def close(self) -> int:
        """Wait for its end and note its time; returns its exit status."""
        code = self.process.wait()
        self.stream.close()
        folder = self.job.folder
        write_text(_record(folder), f"{seconds_of(folder) + time.monotonic() - self.begin:.1f}\n")
        return code


def _record(folder: Path) -> Path:
    """Where the seconds that a training took are kept, those before an interruption included."""
    return folder.with_name(folder.name + ".seconds")


def seconds_of(folder: Path) -> float:
    """Wall-clock seconds that the training in a folder has taken so far."""
    record = _record(folder)
    return float(record.read_text(encoding="utf-8")) if record.is_file() else 0.0


def minutes(seconds: float) -> str:
    """125 -> "2 min 5 s"."""
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
