"""The counterpart of the paper's Figure 5 for an axis: top-1 of each column, with the spread of the seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mae_transfer.engine.files import atomic_path
from mae_transfer.errors import require
from mae_transfer.study.axes import SCRATCH, Axis
from mae_transfer.study.results import Cells


def draw(axis: Axis, cells: Cells, path: Path) -> None:
    """One panel a column: a line where the rows have a place on the axis, else marks; random weights dashed.

    The paper's numbers stand as hollow marks on a scale of their own, at the right: only their order compares.
    """
    require("matplotlib", "dev")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(axis.columns), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    marks: dict[str, Any] = {}
    for number, column in enumerate(axis.columns):
        marks |= _panel(figure.add_subplot(1, len(axis.columns), number + 1), axis, cells, column)
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=len(marks), fontsize=8)
    figure.suptitle(f"{axis.title} (the paper's {axis.source}, at small scale)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _panel(axes: Any, axis: Axis, cells: Cells, column: str) -> dict[str, Any]:
    """Returns the marks of the legend by what they mean."""
    rows = [row for row in axis.rows if (row.label, column) in cells]
    numeric = all(row.position is not None for row in axis.rows)
    places = [row.position if numeric else float(i) for i, row in enumerate(rows)]
    found = [cells[row.label, column] for row in rows]
    means = [cell.mean for cell in found]
    errors = [[cell.mean - min(cell.values) for cell in found], [max(cell.values) - cell.mean for cell in found]]
    style = {"marker": "o", "markersize": 5, "capsize": 3, "color": "#2463c9", "label": "here, lowest to highest seed"}
    axes.errorbar(places, means, yerr=errors, linestyle="-" if numeric else "", **style)
    if not numeric:
        axes.set_xticks(places, [row.label for row in rows], rotation=20, ha="right")
    if (SCRATCH, column) in cells:
        axes.axhline(cells[SCRATCH, column].mean, linestyle="--", color="#777777", label=SCRATCH)
    axes.set(xlabel=axis.x_label if numeric else "", ylabel="top-1 here, %", title=column)
    axes.grid(alpha=0.3, axis="y")
    shown = [value for (_, own), cell in cells.items() if own == column for value in cell.values]
    low, high = min(shown), max(shown)
    room = max(high - low, 0.5)
    axes.set_ylim(max(0.0, low - 0.3 * room), high + 0.4 * room)
    paper = [(place, row.paper[column]) for place, row in zip(places, rows, strict=True) if column in row.paper]
    handles, labels = axes.get_legend_handles_labels()
    if paper:
        right = axes.twinx()
        line = right.plot(*zip(*paper), linestyle="", marker="D", markerfacecolor="none", color="#d9730d")
        right.set_ylabel("paper's ViT-L, %")
        right.margins(y=0.4)
        handles, labels = [*handles, *line], [*labels, "paper (scale at the right)"]
    return dict(zip(labels, handles, strict=True))
