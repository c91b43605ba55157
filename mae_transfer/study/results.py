"""What came of an axis beside what the paper found: a table, and whether the order is the same."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from mae_transfer.study.axes import Axis, Row, rows_of


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The results of a row in a column, one a seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.mean:.2f}"
        spread = statistics.stdev(self.values)
        return f"{self.mean:.2f} ± {spread:.2f} [{min(self.values):.2f}–{max(self.values):.2f}]"


_EQUAL = 0.05  # the paper's numbers have one decimal

Cells = Mapping[tuple[str, str], Cell]  # (label of a row, column)


def findings(axis: Axis, cells: Cells) -> list[str]:
    """For every number of the paper: whether the row lies on the same side of the baseline here.

    Seeds that overlap, or a single one each, leave it open: they are called so.
    """
    base = next(row for row in axis.rows if row.label == axis.baseline)
    return [
        _finding(row, base, column, cells)
        for column in axis.columns
        for row in axis.rows
        if row is not base and column in row.paper and {(row.label, column), (base.label, column)} <= cells.keys()
    ]


def _finding(row: Row, base: Row, column: str, cells: Cells) -> str:
    ours, standard = cells[row.label, column], cells[base.label, column]
    here, there = ours.mean - standard.mean, row.paper[column] - base.paper[column]
    text = f"{column}, {row.label} against {base.label}: {here:+.2f} here, {there:+.1f} in the paper"
    apart = min(ours.values) > max(standard.values) or max(ours.values) < min(standard.values)
    if abs(there) < _EQUAL:
        return f"{text}: the paper finds no difference"
    if min(len(ours.values), len(standard.values)) == 1:
        return f"{text}: {'the same order' if here * there > 0 else 'another order'}, of one seed each"
    if not apart:
        return f"{text}: the seeds overlap"
    return f"{text}: {'agrees' if here * there > 0 else 'disagrees'}, beyond the spread of the seeds"


def markdown(axis: Axis, cells: Cells) -> str:
    """The counterpart of the paper's table: top-1 here, and the paper's numbers for ViT-L beside them."""
    if not cells:
        return "No run is finished yet.\n"
    head = [axis.x_label, *axis.columns, *(f"{column}, paper's ViT-L" for column in axis.columns)]
    rows = [head, ["---"] * len(head)]
    for row in rows_of(axis):
        if any((row.label, column) in cells for column in axis.columns):
            ours = [str(cells.get((row.label, column), "")) for column in axis.columns]
            rows.append([row.label, *ours, *(f"{row.paper[c]:.1f}" if c in row.paper else "" for c in axis.columns)])
    lines = [f"| {' | '.join(cells_)} |" for cells_ in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in findings(axis, cells))]) + "\n"
