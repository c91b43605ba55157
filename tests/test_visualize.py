from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_transfer.visualize import GridRow, _drawable, image_grid, plot_confusion, plot_curves, to_picture


def test_pictures_are_placed_and_enlarged_without_smoothing() -> None:
    red, blue = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255
    blue[1:, :, 2] = 255
    grid = np.asarray(image_grid([GridRow(pictures=[red, blue]), GridRow(pictures=[blue])], tile_height=40))
    colours = {tuple(colour) for colour in grid.reshape(-1, 3)}
    assert colours == {(255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0)}, "nothing in between"
    assert (grid == (255, 0, 0)).all(axis=2).sum() == 40 * 60
    assert (grid == (0, 0, 255)).all(axis=2).sum() == 2 * 30 * 60


def test_labels_titles_and_caption_make_room_for_themselves() -> None:
    tile = np.zeros((160, 160, 1), np.uint8)
    bare = image_grid([GridRow(pictures=[tile])])
    caption = "a sentence that is much too long to fit below a single tile of this width, so it is broken"
    full = image_grid([GridRow(pictures=[tile], label="a label")], columns=["title"], caption=caption)
    assert full.width > bare.width and full.height > bare.height + 60
    assert (np.asarray(full.crop((0, bare.height + 30, full.width, full.height))) < 128).any(), "the caption is drawn"


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (7, 3)])
def test_of_many_channels_the_first_are_shown(channels: int, shown: int) -> None:
    values = torch.arange(channels).view(-1, 1, 1).expand(-1, 2, 2) / 10
    assert to_picture(values)[0, 0].tolist() == [round(i / 10 * 255) for i in range(shown)]


def test_to_picture_rounds_and_clips() -> None:
    values = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 5)
    assert to_picture(values)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("count", [4, 30])
def test_any_name_of_a_class_can_be_drawn(tmp_path: Path, count: int) -> None:
    """Warnings are errors here: of glyphs that the font lacks, and formulas that are none."""
    pytest.importorskip("matplotlib")
    names = ["büro stuhl", "日本", "a$\\nothing$b", "x\ny", *(f"class {number}" for number in range(4, count))]
    assert _drawable(names)[:4] == ["büro stuhl", "1: □□", "a$\\nothing$b", "3: x□y"]
    confusion = np.eye(count, dtype=np.int64) + np.eye(count, k=1, dtype=np.int64)
    plot_confusion(confusion, names, mistakes=[(0, 1, 1), (1, 2, 1), (2, 3, 1)], path=tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.width > 300


def test_curves_are_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    plot_curves({"train": [(0, 1), (1, 0.5)], "unseen": [(1, 0.6)]}, path=path, x_label="epoch", y_label="loss")
    with Image.open(path) as image:
        assert image.width > 300 and len(image.convert("RGB").getcolors(100_000) or []) > 2
