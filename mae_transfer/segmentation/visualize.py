"""Semantic overlays: image | ground truth | prediction, with a legend of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IGNORE = 255
OPACITY = 0.55
_BAR, _MARGIN, _FONT_SIZE = 22, 6, 14
_READABLE_SIDE = 256  # pixels of the longer side of a panel
_ROWS = 30  # of the legend of all classes

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def overlay(image: np.ndarray, labels: np.ndarray, palette: Sequence[Colour], opacity: float = OPACITY) -> np.ndarray:
    """Blend the colours of ``labels`` (H, W) over ``image`` (H, W, 3) uint8 RGB; ignored pixels stay as they are."""
    table = np.zeros((256, 3), dtype=np.float32)
    table[: len(palette)] = np.asarray(palette, dtype=np.float32)
    blended = (1 - opacity) * image.astype(np.float32) + opacity * table[labels]
    known = (labels < len(palette))[..., None]
    return np.where(known, blended.round(), image).astype(np.uint8)


def draw_segmentation(
    image: np.ndarray,
    prediction: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Colour],
    truth: np.ndarray | None = None,
) -> Image.Image:
    """Panels side by side under their titles, and below them a legend of the classes that occur in any.

    Small images are enlarged by a whole factor, so that titles and legend fit.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: (H, W) labels.
        classes: names in the order of their labels.
        palette: a colour for each.
        truth: (H, W) labels with 255 for unlabelled pixels, or None for no panel.
    """
    panels = [("image", image)]
    if truth is not None:
        panels.append(("ground truth", overlay(image, truth, palette)))
    panels.append(("prediction", overlay(image, prediction, palette)))
    scale = max(1, round(_READABLE_SIDE / max(image.shape[:2])))
    height, width = scale * image.shape[0], scale * image.shape[1]
    shown = [prediction] if truth is None else [prediction, truth]
    present = sorted({int(label) for labels in shown for label in np.unique(labels) if label < len(classes)})
    font = ImageFont.load_default(_FONT_SIZE)
    total_width = len(panels) * width + (len(panels) - 1) * _MARGIN
    names = [classes[label] for label in present]
    total_width = max([total_width, *(2 + _entry_width(name, font) for name in names)])
    lines = _legend_lines(names, total_width, font)
    canvas = Image.new("RGB", (total_width, _BAR + height + _MARGIN + _BAR * max(len(lines), 1)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (title, panel) in enumerate(panels):
        left = index * (width + _MARGIN)
        draw.text((left + 2, 3), title, fill="black", font=font)
        picture = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, _BAR))
    entries = iter(present)
    for row, line in enumerate(lines):
        top = _BAR + height + _MARGIN + row * _BAR
        for left, name in line:
            _draw_entry(draw, left, top, name, palette[next(entries)], font)
    return canvas


def draw_legend(classes: Sequence[str], palette: Sequence[Colour], first_label: int = 0) -> Image.Image:
    """Every class with its colour and its label in mask files, in columns of at most ``_ROWS``."""
    font = ImageFont.load_default(_FONT_SIZE)
    names = [f"{first_label + index}  {name}" for index, name in enumerate(classes)]
    columns = [names[first : first + _ROWS] for first in range(0, len(names), _ROWS)]
    widths = [_entry_width(max(column, key=font.getlength), font) for column in columns]
    canvas = Image.new("RGB", (sum(widths) + _MARGIN, _BAR * min(len(names), _ROWS) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(names):
        column, row = divmod(index, _ROWS)
        _draw_entry(draw, sum(widths[:column]) + 2, row * _BAR, name, palette[index], font)
    return canvas


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture by way of a temporary name, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)


def _draw_entry(draw: ImageDraw.ImageDraw, left: int, top: int, name: str, colour: Colour, font: Font) -> None:
    draw.rectangle((left, top + 3, left + 13, top + 16), fill=tuple(colour))
    draw.text((left + 18, top + 1), name, fill="black", font=font)


def _entry_width(name: str, font: Font) -> int:
    return 18 + round(font.getlength(name)) + 14


def _legend_lines(names: Sequence[str], width: int, font: Font) -> list[list[tuple[int, str]]]:
    """Lay names out left to right, and on further lines where they do not fit: [[(left, name), …], …]."""
    lines: list[list[tuple[int, str]]] = []
    left = width + 1
    for name in names:
        needed = _entry_width(name, font)
        if left + needed > width or not lines:
            lines.append([])
            left = 2
        lines[-1].append((left, name))
        left += needed
    return lines
