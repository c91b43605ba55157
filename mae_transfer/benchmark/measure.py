"""Timing several contestants in turns, so that a change in the machine's state meets all of them alike.

Each contestant lives in a process of its own: its peak memory can be told apart, and what its allocator does or its
libraries set does not reach the others. Only one computes at a time.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mae_transfer.engine.hardware import resident_bytes
from mae_transfer.errors import RunFailed, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Contestant(ABC):
    """One thing that is timed. Made where the benchmark runs, used in a process of its own, so it must pickle.

    Attributes:
        name: its row of the table.
        flops: counted floating-point operations of a turn; 0 where they are not counted.
    """

    name: str
    flops: float = 0.0

    def imports(self) -> None:  # noqa: B027  # most have none
        """Load libraries: not counted as memory."""

    @abstractmethod
    def set_up(self) -> None:
        """Build everything that a turn needs."""

    @abstractmethod
    def turn(self) -> None:
        """What is timed."""


class MatrixProducts(Contestant):
    """The machine's rate: nothing but the products of tokens (T, width) with weights (hidden, width).

    Args:
        shapes: (T, width, hidden), those of the model that is held against this.
    """

    def __init__(self, precision: str, shapes: Sequence[tuple[int, int, int]]) -> None:
        self.name = f"matrix products, {precision}"
        self.precision = precision
        self.shapes = list(shapes)
        self.flops = float(sum(2 * tokens * width * hidden for tokens, width, hidden in self.shapes))

    def set_up(self) -> None:
        dtype = DTYPES[self.precision]
        self.operands = [(torch.randn(t, w).to(dtype), torch.randn(h, w).to(dtype)) for t, w, h in self.shapes]

    def turn(self) -> None:
        for tokens, weight in self.operands:
            F.linear(tokens, weight)


@dataclass
class Timing:
    """A contestant's turns.

    Attributes:
        seconds: of each round's turn.
        memory_bytes: peak resident memory less that of the process after its imports.
    """

    name: str
    flops: float
    seconds: list[float] = field(default_factory=list)
    memory_bytes: int = 0

    @property
    def gflops(self) -> list[float]:
        """Counted GFLOP/s of each round."""
        return [self.flops / seconds / 1e9 for seconds in self.seconds]


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum over the rounds."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))

    def show(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} [{self.minimum:.{digits}f}–{self.maximum:.{digits}f}]"


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of numbers measured in the same rounds: the ratio of each round, then their spread."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def race(
    contestants: Sequence[Contestant], *, rounds: int, threads: int, warm_up: int = 1, max_seconds: float | None = None
) -> list[Timing]:
    """Let the contestants take turns, the first of each round moving on by one.

    Args:
        warm_up: turns of each that are not counted.
        max_seconds: begin no further round so long after the warm-up; the first is always run.

    Raises:
        UserError: what a contestant raised. RunFailed: its process died (out of memory, most likely).
    """
    timings = [Timing(contestant.name, contestant.flops) for contestant in contestants]
    with ExitStack() as stack:
        pipes = [stack.enter_context(_process(contestant, threads)) for contestant in contestants]
        for _ in range(warm_up):
            for pipe in pipes:
                _ask(pipe, "turn")
        before = time.perf_counter()
        for round_ in range(rounds):
            if round_ and max_seconds is not None and time.perf_counter() - before > max_seconds:
                break
            for place in range(len(pipes)):
                index = (round_ + place) % len(pipes)
                timings[index].seconds.append(_ask(pipes[index], "turn"))
        for timing, pipe in zip(timings, pipes, strict=True):
            timing.memory_bytes = _ask(pipe, "memory")
    return timings


def peak_memory(contestants: Sequence[Contestant], *, turns: int, threads: int) -> dict[str, int]:
    """Peak resident memory of each less its baseline after imports, one process after the other. In bytes."""
    peaks = {}
    for contestant in contestants:
        with _process(contestant, threads) as pipe:
            for _ in range(turns):
                _ask(pipe, "turn")
            peaks[contestant.name] = _ask(pipe, "memory")
    return peaks


@contextmanager
def _process(contestant: Contestant, threads: int) -> Iterator[Connection]:
    # Not forked: a fork would inherit this process's memory, and its OpenMP threads in a state that cannot be used.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(contestant, threads, there), daemon=True)
    process.start()
    there.close()
    try:
        _ask(here, None)
        yield here
    finally:
        here.close()
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()


def _ask(pipe: Connection, question: str | None) -> Any:
    try:
        if question is not None:
            pipe.send(question)
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        raise RunFailed("a process of the benchmark died; the likely cause is too little memory") from error
    if isinstance(answer, UserError):
        raise answer
    return answer


def _serve(contestant: Contestant, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        contestant.imports()
        F.linear(torch.ones(8, 8), torch.ones(8, 8))  # libraries take their own memory with the first product
        baseline = resident_bytes("VmRSS")
        contestant.set_up()
    except UserError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    while True:
        try:
            question = pipe.recv()
        except EOFError:  # the benchmark is over
            return
        if question == "memory":
            pipe.send(resident_bytes("VmHWM") - baseline)
        else:
            before = time.perf_counter()
            contestant.turn()
            pipe.send(time.perf_counter() - before)


def environment(threads: int) -> dict[str, Any]:
    """What the figures belong to."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "threads": threads,
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor()
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """``content`` as a file, where one was asked for."""
    if path:
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
