"""Line and bar charts as SVG text, for pages that must open without scripts and without a network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#2463c9", "#d9730d", "#0f8a6c", "#a13a8f")


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart: (x, y) points in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a bar chart; bars of the same group stand together, in a colour for each name."""

    group: str
    name: str
    value: float


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    return f"{value:.6g}"


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """An SVG of lines over a common x axis, with a legend when there are several."""
    width, height, left, right, top, bottom = 880, 300, 62, 16, 30, 46
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    assert xs, "a chart needs points"
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
    high_x = high_x if high_x > low_x else low_x + 1
    margin = 0.06 * (high_y - low_y) or 0.5
    low_y, high_y = low_y - margin, high_y + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - low_x) / (high_x - low_x) * (width - left - right)
        return across, top + (high_y - y) / (high_y - low_y) * (height - top - bottom)

    parts = []
    for y in ticks(low_y, high_y):
        _, row = place(low_x, y)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{row:.1f}" y2="{row:.1f}" stroke="#e9ecf1"/>')
        parts.append(f'<text x="{left - 8}" y="{row + 4:.1f}" text-anchor="end">{_label(y)}</text>')
    for x in ticks(low_x, high_x, 8):
        column, _ = place(x, low_y)
        parts.append(f'<text x="{column:.1f}" y="{height - bottom + 18}" text-anchor="middle">{_label(x)}</text>')
    for number, line in enumerate(series):
        placed = [place(*point) for point in line.points]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round" points="{points}"/>'
        )
        if len(placed) <= 12:  # few measurements are shown as such, and a single one is seen at all
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in placed]
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts.append(f'<text x="{left - 46}" y="14" fill="#1d2330">{html.escape(y_label)}</text>')
    if len(series) > 1:
        across = width - right - sum(34 + 7.2 * len(line.name) for line in series)
        for number, line in enumerate(series):
            colour = COLOURS[number % len(COLOURS)]
            parts.append(f'<rect x="{across:.0f}" y="5" width="14" height="10" rx="2" fill="{colour}"/>')
            parts.append(f'<text x="{across + 20:.0f}" y="14">{html.escape(line.name)}</text>')
            across += 34 + 7.2 * len(line.name)
    return _svg(width, height, parts)


def bar_chart(bars: Sequence[Bar], *, unit: str) -> str:
    """An SVG of horizontal bars from 0 in groups, the value written at each bar's end."""
    assert bars, "a bar chart needs bars"
    names = list(dict.fromkeys(bar.name for bar in bars))
    groups = list(dict.fromkeys(bar.group for bar in bars))
    left, right, thick, gap = 170, 90, 20, 18
    width, row = 880, 0
    longest = max(max(bar.value for bar in bars), 1e-9)
    parts, across = [], float(left)
    for number, name in enumerate(names):
        parts.append(f'<rect x="{across:.0f}" y="5" width="14" height="10" rx="2" fill="{COLOURS[number]}"/>')
        parts.append(f'<text x="{across + 20:.0f}" y="14">{html.escape(name)}</text>')
        across += 46 + 7.2 * len(name)
    row = 32
    for group in groups:
        members = [bar for bar in bars if bar.group == group]
        middle = row + len(members) * (thick + 2) / 2 + 4
        parts.append(
            f'<text x="{left - 14}" y="{middle:.0f}" text-anchor="end" fill="#1d2330">{html.escape(group)}</text>'
        )
        for bar in members:
            length = max(0.0, bar.value) / longest * (width - left - right)
            colour = COLOURS[names.index(bar.name)]
            parts.append(f'<rect x="{left}" y="{row}" width="{length:.1f}" height="{thick}" rx="2" fill="{colour}"/>')
            value = f"{bar.value:.1f} {html.escape(unit)}"
            parts.append(f'<text x="{left + length + 7:.0f}" y="{row + 15}" fill="#1d2330">{value}</text>')
            row += thick + 2
        row += gap
    return _svg(width, row, parts)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    font = 'font-family="system-ui, Noto Sans, DejaVu Sans, sans-serif" font-size="13" fill="#5b6472"'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" {font}>{"".join(parts)}</svg>'
