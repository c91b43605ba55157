"""Pictures: labelled grids of images, and curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae_transfer.engine.files import atomic_path
from mae_transfer.errors import require

Picture = npt.NDArray[np.uint8]  # (H, W, 3) or (H, W, 1)

_GAP = 6
_BACKGROUND, _INK = (255, 255, 255), (20, 20, 20)


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One row of a grid: its pictures and what to write at its left."""

    pictures: Sequence[Picture]
    label: str = ""


def to_picture(image: Tensor) -> Picture:
    """(C, H, W) in 0..1 to (H, W, 3 or 1) uint8: of measured data the first three channels, or the first of two."""
    image = image if len(image) in (1, 3) else image[: 3 if len(image) > 3 else 1]
    return (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def image_grid(
    rows: Sequence[GridRow], *, columns: Sequence[str] = (), caption: str = "", tile_height: int = 160
) -> Image.Image:
    """Rows of pictures with column titles above, row labels at the left and a caption below.

    Small pictures are enlarged by a whole factor, pixel by pixel, to about ``tile_height``: nothing is smoothed.
    """
    tiles = [[_enlarge(picture, tile_height) for picture in row.pictures] for row in rows]
    num_columns = max(len(row) for row in tiles)
    widths = [max(row[i].width for row in tiles if i < len(row)) for i in range(num_columns)]
    heights = [max(tile.height for tile in row) for row in tiles]
    font = ImageFont.load_default(size=13)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max((int(_text_size(ruler, row.label, font)[0]) for row in rows), default=0)
    left += _GAP if left else 0
    top = max((_text_size(ruler, title, font)[1] for title in columns), default=0)
    top += _GAP if top else 0
    width = left + sum(widths) + _GAP * (num_columns + 1)
    caption = _wrap(ruler, caption, font, width - 2 * _GAP)
    bottom = _text_size(ruler, caption, font)[1] + _GAP if caption else 0
    height = top + sum(heights) + _GAP * (len(rows) + 1) + bottom
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    y = top + _GAP
    for row, row_tiles, row_height in zip(rows, tiles, heights, strict=True):
        draw.text((_GAP, y), row.label, fill=_INK, font=font)
        x = left + _GAP
        for i, tile in enumerate(row_tiles):
            canvas.paste(tile, (x, y))
            x += widths[i] + _GAP
        y += row_height + _GAP
    x = left + _GAP
    for title, column_width in zip(columns, widths, strict=False):
        draw.text((x, _GAP), title, fill=_INK, font=font)
        x += column_width + _GAP
    draw.text((_GAP, y), caption, fill=_INK, font=font)
    return canvas


def _enlarge(picture: Picture, height: int) -> Image.Image:
    image = Image.fromarray(np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture)
    factor = max(1, round(height / image.height))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _text_size(draw: ImageDraw.ImageDraw, text: str, font: Any) -> tuple[int, int]:
    if not text:
        return 0, 0
    box = draw.multiline_textbbox((0, 0), text, font=font)
    return int(box[2]) + 1, int(box[3]) + 3


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """Break ``text`` at spaces into lines no wider than ``width`` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}", font=font) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, path: Path, x_label: str, y_label: str, title: str = ""
) -> None:
    """Draw curves, name -> (x, y) points, into an image file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "dev")
    # The figure is made by hand: pyplot would keep global state and choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.2)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of several plots: for each name some curves, (x, y) points at the same x, such as one a seed."""

    title: str
    y_label: str
    bands: Mapping[str, Sequence[Sequence[tuple[float, float]]]]


def plot_panels(panels: Sequence[Panel], *, columns: int, x_label: str, path: Path) -> None:
    """Draw panels in rows of ``columns``: the mean of a name's curves, and a band from their lowest to their highest.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "dev")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        for name, curves in panel.bands.items():
            points: dict[float, list[float]] = {}
            for curve in curves:
                for x, y in curve:
                    points.setdefault(x, []).append(y)
            xs = sorted(points)
            (line,) = axes.plot(xs, [sum(points[x]) / len(points[x]) for x in xs], label=name, marker="o", markersize=3)
            low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
            axes.fill_between(xs, low, high, alpha=0.2, color=line.get_color())
        axes.set(xlabel=x_label, ylabel=panel.y_label, title=panel.title)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix[1:])


def plot_confusion(
    confusion: npt.NDArray[np.int64],
    classes: Sequence[str],
    *,
    mistakes: Sequence[tuple[int, int, int]],
    path: Path,
    title: str = "",
) -> None:
    """Draw a confusion matrix, (c, c) images of the class of the row taken for that of the column, into an image file.

    Each row is coloured by its shares, on a scale of square roots so that a mistake of a few per cent is seen among
    200 classes. Up to ``_NAMED_CELLS`` classes have a number of per cent in each cell; above, every so many classes are
    named, and the most frequent mistakes stand beside the matrix.

    A class whose name the font cannot write has its number, counted from 0, in front of what can be written of it.

    Args:
        mistakes: (class, taken for, images), in the order to show them.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "dev")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(classes)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    named = count <= _NAMED_CELLS
    side = min(10.0, 3.0 + 0.42 * count)
    figure = Figure(figsize=(side + (1.5 if named else 6.0), side), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 1 if named else 2, width_ratios=[1] if named else [1.7, 1])
    axes = figure.add_subplot(grid[0, 0])
    image = axes.imshow(100 * shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    ticks = range(0, count, -(-count // 40))
    shown = _drawable(classes)
    names = [_shorten(shown[tick], 24) for tick in ticks]
    size = 9 if named else 7
    axes.set_xticks(ticks, names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=size, parse_math=False)
    axes.set(xlabel="taken for", ylabel="class", title=title)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, ticks=[0, 1, 5, 20, 50, 100])
    bar.set_label("% of the class's images")
    if named:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            share = 100 * shares[row, column]
            ink = "white" if share > 35 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8 if count > 12 else 9, color=ink)
    else:
        _plot_mistakes(figure.add_subplot(grid[0, 1]), mistakes, confusion.sum(axis=1), shown)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix[1:])


_NAMED_CELLS = 25


def _plot_mistakes(
    axes: Any, mistakes: Sequence[tuple[int, int, int]], totals: npt.NDArray[np.int64], classes: Sequence[str]
) -> None:
    """Mistakes as bars, the first on top."""
    axes.barh(range(len(mistakes)), [100 * images / totals[row] for row, _, images in mistakes], color="#9ecae1")
    for place, (row, column, images) in enumerate(mistakes):
        text = f"{_shorten(classes[row], 22)} → {_shorten(classes[column], 22)}   {images} of {totals[row]}"
        axes.text(0.3, place, text, va="center", fontsize=8, parse_math=False)
    axes.set(title="most frequent mistakes", xlabel="% of the class's images", yticks=[])
    axes.invert_yaxis()


def _drawable(names: Sequence[str]) -> list[str]:
    """Names in characters that the font has: with a box in place of others, and the name's number in front."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    drawn = ["".join(letter if ord(letter) in known else "□" for letter in name) for name in names]
    return [
        name if name == original else f"{number}: {name}"
        for number, (name, original) in enumerate(zip(drawn, names, strict=True))
    ]


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
