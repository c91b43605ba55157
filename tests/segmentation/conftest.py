"""Small ADE-layout folders and models, made in the test's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

from mae_transfer.segmentation.config import derive
from mae_transfer.segmentation.recipe import Facts
from mae_transfer.segmentation.settings import read_settings

# What MMSegmentation itself warns of, none of which a user of ours can act on.
IGNORED_WARNINGS = (
    "ignore:Default ``avg_non_ignore`` is False:UserWarning",
    "ignore:``build_pixel_sampler`` would be deprecated soon:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every other warning is an error, as everywhere."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in IGNORED_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


COLOURS = np.array([(40, 40, 40), (220, 60, 60), (60, 200, 80), (70, 90, 230)])
CLASSES = ("ground", "red", "green", "blue")


def draw_scene(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Noisy image (H, W, 3) of coloured boxes and its labels (H, W), 0 to 3; edges lie on multiples of 8 pixels."""
    rng = np.random.default_rng(seed)
    height, width = size
    labels = np.zeros(size, dtype=np.uint8)
    for label in (1, 2, 3):
        top, left = 8 * rng.integers(0, height // 16), 8 * rng.integers(0, width // 16)
        labels[top : top + height // 24 * 8, left : left + width // 24 * 8] = label
    image = COLOURS[labels] + rng.normal(0, 8, size=(height, width, 3))
    return image.clip(0, 255).astype(np.uint8), labels


def their_name(name: str) -> str:
    """A parameter of ours in MMSegmentation's names (written from its module tree)."""
    for ours, theirs in {
        "backbone.patch_embed.proj.": "backbone.patch_embed.projection.",
        "backbone.blocks.": "backbone.layers.",
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
        ".ls1.gamma": ".gamma_1",
        ".ls2.gamma": ".gamma_2",
        "neck.levels.0.": "neck.upsample_4x.",
        "neck.levels.1.": "neck.upsample_2x.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def stir(model: nn.Module) -> None:
    """Change every weight and every batch statistic at random: all of them matter then."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand_like(buffer))


def write_folder(
    root: Path, *, num_train: int = 4, num_val: int = 2, size: tuple[int, int] = (64, 80), zero: bool = False
) -> Path:
    """Write an ADE-layout folder of boxes and return it; ``zero``: labels 1 to 4, not 0 to 3."""
    for split, count in (("training", num_train), ("validation", num_val)):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for index in range(count):
            image, labels = draw_scene(index, size)
            Image.fromarray(image).save(root / "images" / split / f"scene_{index}.png")
            Image.fromarray(labels + zero).save(root / "annotations" / split / f"scene_{index}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """``write_folder`` in the test's own folder, which gets ``name``."""

    def make(name: str = "ade", **options: Any) -> Path:
        return write_folder(tmp_path / name, **options)

    return make


@pytest.fixture
def tiny_facts() -> Facts:
    """Four classes on a tiny encoder with patch 8."""
    return Facts(size="tiny", patch_size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), classes=CLASSES)


@pytest.fixture
def tiny_config(tiny_facts: Facts, tmp_path: Path):
    """A function from nested settings to a complete config of a light UperNet on 64-pixel crops."""

    def make(**sections: dict):
        base = {
            "dataset": {"crop_size": 64},
            "encoder": {"size": "tiny", "patch_size": 8},
            "head": {"channels": 32, "aux_channels": 32},
            "train": {"max_iters": 10, "batch_size": 2},
        }
        merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
        return derive(read_settings(merged), tiny_facts, str(tmp_path / "run"))

    return make
