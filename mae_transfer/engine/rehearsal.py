"""Real steps before a long run: how fast is it, how much memory does it take, how long will it be."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae_transfer.engine.hardware import memory_in_use
from mae_transfer.engine.objective import Objective
from mae_transfer.engine.progress import duration
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.trainer import Hook

_SECONDS = 15.0  # for steps after the first, which warms up
_LONG_STEP = 60.0  # is measured by itself, and nothing else is
_MOST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a few steps of a run, and each of its evaluations once, have shown.

    Attributes:
        seconds: of a step, the median.
        num_steps: that were measured.
        data_wait: share of a step spent waiting for batches.
        peak_memory: bytes.
        ceiling: GFLOP/s of all processes together that MFU is relative to.
        evaluations: what is done how often -> seconds in the whole run.
        skipped: evaluations were not measured, as a step alone takes so long.
    """

    run: Objective[Any]
    seconds: float
    num_steps: int
    data_wait: float
    peak_memory: int
    ceiling: float
    evaluations: dict[str, float]
    skipped: bool

    def data(self) -> str:
        run, batch_size = self.run, self.run.settings.train.batch_size
        return (
            f"data             {run.num_samples} images, {run.num_steps} steps of {batch_size} on "
            f"{run.processes.world_size} process(es)"
        )

    def step(self) -> str:
        gflops, speed = self.run.sample_flops / 1e9, self.run.settings.train.batch_size / self.seconds
        known = "measured" if self.run.settings.log.peak_gflops is None else "given"
        return (
            f"step             {self.seconds:.3g} s (median of {self.num_steps}), {speed:.1f} images/s, "
            f"{speed * gflops:.3g} GFLOP/s = {speed * gflops / self.ceiling:.0%} of the {known} "
            f"{self.ceiling:.0f} (MFU)"
        )

    def waiting(self) -> str:
        return f"data wait        {self.data_wait:.1%} of the step"

    def memory(self) -> str:
        kind = "GPU" if self.run.processes.device.type == "cuda" else "resident, data and libraries included"
        return f"peak memory      {self.peak_memory / 2**30:.2f} GiB a process ({kind})"

    def projected(self) -> str:
        steps = self.seconds * self.run.num_steps
        total = steps + sum(self.evaluations.values())
        others = "".join(f", {name} {duration(spent)}" for name, spent in self.evaluations.items())
        note = "; evaluation and pictures not measured, as a step alone takes this long" if self.skipped else ""
        return f"projected time   {duration(total)} for the whole run: steps {duration(steps)}{others}{note}"


def rehearse(run: Objective[Any], hooks: Callable[[RunFolder], Sequence[Hook]]) -> Rehearsal:
    """Take a few real steps, and each evaluation once. Nothing is written to ``run.dir``.

    Args:
        hooks: the evaluations of a run in the folder that it is given, which has no other use.
    """
    processes = run.processes
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        folder.reconstructions.mkdir(parents=True)
        evaluations = hooks(folder)
        trainer = run.trainer(folder)
        steps = trainer.timed_steps(1)
        first = steps[0][0]
        short = not processes.any(first > _LONG_STEP)
        wanted = 1 + processes.largest([max(1, min(_MOST_STEPS, int(_SECONDS / first)))])[0]
        left = run.num_steps - trainer.step
        if short and left:
            steps = trainer.timed_steps(min(wanted, left))
            if len(steps) > 1:  # the first of these starts the loader anew, which a run does once
                steps = steps[1:]
        peak = memory_in_use(processes.device)
        timed = _timed(run, evaluations) if short else {}
    assert trainer.peak_flops is not None
    return Rehearsal(
        run=run,
        seconds=statistics.median(taken for taken, _ in steps),
        num_steps=len(steps),
        data_wait=sum(waited for _, waited in steps) / max(sum(taken for taken, _ in steps), 1e-9),
        peak_memory=peak,
        ceiling=trainer.peak_flops / 1e9,
        evaluations=timed,
        skipped=bool(evaluations) and not short,
    )


def _timed(run: Objective[Any], hooks: Sequence[Hook]) -> dict[str, float]:
    """Seconds that each kind of evaluation takes in the whole run, from doing it once."""
    spent = {}
    run.model.eval()
    with torch.no_grad():
        for hook in hooks:
            before = time.perf_counter()
            hook.run(0)
            times = -(-run.num_steps // hook.every_steps)
            called = getattr(hook.run, "__name__", "evaluate")
            name = {"evaluate": "evaluation", "reconstruct": "pictures"}.get(called, called)
            spent[f"{times} x {name}"] = (time.perf_counter() - before) * times
    run.model.train()
    return spent


def parameter_table(model: nn.Module) -> str:
    """fvcore's table of parameters, where fvcore is installed."""
    try:
        from fvcore.nn import parameter_count_table
    except ImportError:
        return "parameters       no table: fvcore is not installed (pip install fvcore, or the detection extra)"
    return str(parameter_count_table(model, max_depth=1))


def parameter_counts(model: nn.Module) -> str:
    """ "5.67 M parameters (5.54 M train)"."""
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6 for every in (True, False)]
    return f"{counts[0]:.2f} M parameters ({counts[1]:.2f} M train)"
