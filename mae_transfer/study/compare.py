"""The same training from several initial encoders: run it, go on where it stopped, and say what came of it.

A comparison is a grid of trainings, (share of the labels) x (initial encoder) x (seed), which differ in nothing else.
Each is a process of its own with a folder of its own; what is finished is not run again, what was begun is resumed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from mae_transfer.engine.files import write_text
from mae_transfer.errors import ConfigError
from mae_transfer.study.jobs import Job, minutes, run_jobs, seconds_of

Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Init:
    """An initial encoder; ``checkpoint`` None is random weights."""

    name: str
    checkpoint: Path | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a comparison."""

    fraction: float
    init: Init
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f"{percent(self.fraction)} of the labels, {self.init.name}, seed {self.seed}"


class Task(Protocol):
    """What is trained."""

    metrics: ClassVar[Mapping[str, str]]  # key of a metric -> how it is called

    def check(self, run: Run) -> None:
        """Raises UserError for what the run would refuse."""

    def command(self, run: Run) -> list[str]:
        """Arguments for Python that start a run, or take it up where it stopped."""

    def curves(self, run: Run) -> dict[str, Curve]:
        """Metric -> (step, value) so far."""

    def is_finished(self, run: Run) -> bool: ...


def percent(fraction: float) -> str:
    """0.25 -> "25 %"."""
    return f"{100 * fraction:g} %"


def plan(out: Path, *, inits: Sequence[Init], seeds: Sequence[int], fractions: Sequence[float]) -> list[Run]:
    """Every training, in an order in which the starts advance together: an interrupted comparison compares too.

    Raises:
        ConfigError: something given twice, a share outside (0, 1], nothing to compare.
    """
    for what, values in (("--init", [init.name for init in inits]), ("--seeds", seeds), ("--fractions", fractions)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{what} has a value twice: {' '.join(map(str, values))}")
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise ConfigError(f"--fractions {wrong[0]}: expected shares of the labels above 0 and at most 1")
    if len(inits) < 2:
        raise ConfigError("a comparison needs two starts or more, such as --init pretrained=FILE --init random")
    return [
        Run(fraction=f, init=init, seed=seed, folder=out / "runs" / f"{f:g}" / init.name / f"seed-{seed}")
        for seed in seeds
        for f in fractions
        for init in inits
    ]


def run_all(task: Task, runs: Sequence[Run], *, jobs: int, threads: int) -> str | None:
    """Run what is not finished, ``jobs`` at a time with ``threads`` threads each; see ``run_jobs``."""
    todo = [
        Job(
            title=run.title,
            folder=run.folder,
            command=partial(task.command, run),
            is_finished=partial(task.is_finished, run),
        )
        for run in runs
    ]
    return run_jobs(todo, at_a_time=jobs, threads=threads)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The last value of a metric over the seeds, for one share of the labels and one start.

    Attributes:
        values: one a seed, in the order of the seeds.
    """

    fraction: float
    init: str
    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation; 0 of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def show(self) -> str:
        return f"{self.mean:.2f} ± {self.deviation:.2f} [{min(self.values):.2f}–{max(self.values):.2f}]"


def outcomes(task: Task, runs: Sequence[Run]) -> list[Outcome]:
    """Of the runs that are finished."""
    values: dict[tuple[float, str, str], list[float]] = {}
    for run in runs:
        if task.is_finished(run):
            for metric, curve in task.curves(run).items():
                values.setdefault((run.fraction, run.init.name, metric), []).append(curve[-1][1])
    return [Outcome(fraction=f, init=i, metric=m, values=tuple(v)) for (f, i, m), v in values.items()]


def verdicts(found: Sequence[Outcome], metrics: Mapping[str, str]) -> list[str]:
    """For each share and metric, whether the first start's worst seed is above the others' best, in words."""
    lines = []
    for first, other in _pairs(found):
        gain = first.mean - other.mean
        apart = min(first.values) > max(other.values)
        lines.append(
            f"{percent(first.fraction)} of the labels, {metrics[first.metric]}: {first.init} {gain:+.2f} over "
            f"{other.init}; " + ("its worst seed is above the other's best" if apart else "the seeds overlap")
        )
    return lines


def _pairs(found: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    firsts: dict[tuple[float, str], Outcome] = {}
    pairs = []
    for outcome in found:
        first = firsts.setdefault((outcome.fraction, outcome.metric), outcome)
        if first is not outcome:
            pairs.append((first, outcome))
    return pairs


def markdown(task: Task, runs: Sequence[Run]) -> str:
    """A table of the finished runs: mean ± deviation [lowest–highest] over the seeds."""
    found = outcomes(task, runs)
    if not found:
        return "No run is finished yet.\n"
    head = ["labels", "start", "seeds", *task.metrics.values(), "time a run"]
    rows = [head, ["---"] * len(head)]
    for fraction, init in dict.fromkeys((outcome.fraction, outcome.init) for outcome in found):
        own = {o.metric: o for o in found if (o.fraction, o.init) == (fraction, init)}
        spent = [
            seconds_of(r.folder) for r in runs if (r.fraction, r.init.name) == (fraction, init) and task.is_finished(r)
        ]
        cells = [own[metric].show() for metric in task.metrics]
        rows.append([percent(fraction), init, str(len(spent)), *cells, f"at most {minutes(max(spent))}"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in verdicts(found, task.metrics))]) + "\n"


def write_results(out: Path, task: Task, runs: Sequence[Run]) -> None:
    """``results.md``, ``results.json`` and ``curves.png`` of what is finished."""
    from mae_transfer.visualize import Panel, plot_panels

    write_text(out / "results.md", markdown(task, runs))
    content = [
        {
            "fraction": run.fraction,
            "init": run.init.name,
            "seed": run.seed,
            "seconds": seconds_of(run.folder),
            "curves": task.curves(run),
        }
        for run in runs
        if task.is_finished(run)
    ]
    write_text(out / "results.json", json.dumps(content, indent=1) + "\n")
    panels = []
    for metric, label in task.metrics.items():
        for fraction in dict.fromkeys(run.fraction for run in runs):
            bands: dict[str, list[Curve]] = {}
            for run in runs:
                if run.fraction == fraction and task.is_finished(run):
                    bands.setdefault(run.init.name, []).append(task.curves(run)[metric])
            if bands:
                panels.append(Panel(title=f"{percent(fraction)} of the labels", y_label=label, bands=bands))
    if panels:
        columns = len({panel.title for panel in panels})
        plot_panels(panels, columns=columns, x_label="iterations", path=out / "curves.png")
