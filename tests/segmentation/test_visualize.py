"""Overlays show the labels' colours, and everything that is written on them can be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mae_transfer.segmentation.visualize import draw_legend, draw_segmentation, overlay

PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
CLASSES = ("sky", "tree", "a class with a name that is wider than a thumbnail")


def colours_in(picture: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.array(picture).reshape(-1, 3).tolist()))


def test_an_overlay_blends_known_labels_and_leaves_ignored_pixels() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    blended = overlay(image, np.array([[0, 1], [2, 255]]), PALETTE, opacity=0.5)
    np.testing.assert_array_equal(blended, [[[150, 50, 50], [50, 150, 50]], [[50, 50, 150], [100, 100, 100]]])


@pytest.mark.parametrize(("size", "scale"), [((40, 32), 6), ((128, 100), 2), ((300, 400), 1)])
@pytest.mark.parametrize("with_truth", [False, True])
def test_small_images_are_enlarged_and_names_fit(size: tuple[int, int], scale: int, with_truth: bool) -> None:
    image, labels = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
    labels[:, 1:] = 2
    truth = np.full(size, 1, np.uint8) if with_truth else None
    picture = draw_segmentation(image, labels, CLASSES, PALETTE, truth)
    panels = 3 if with_truth else 2
    assert picture.width >= panels * scale * size[1]
    assert picture.height >= scale * size[0] + 22
    # Colours of the legend: of the classes that occur, and no others.
    legend = colours_in(picture.crop((0, picture.height - 22 * 3, picture.width, picture.height)))
    assert {PALETTE[0], PALETTE[2]} <= legend
    assert (PALETTE[1] in legend) is with_truth
    # The longest name ends inside: its last column of pixels is followed by white.
    assert colours_in(picture.crop((picture.width - 1, picture.height - 22, picture.width, picture.height))) == {
        (255, 255, 255)
    }


@pytest.mark.parametrize("count", [1, 30, 31, 150])
def test_the_legend_of_all_classes_shows_every_colour(count: int) -> None:
    palette = [(index, 255 - index, 7) for index in range(count)]
    picture = draw_legend([f"class {index}" for index in range(count)], palette, first_label=1)
    assert set(palette) <= colours_in(picture)
    assert picture.height <= 30 * 22 + 6
