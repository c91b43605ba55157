"""Generated scenes in COCO format, small enough to train on in seconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}]  # gaps, and not in order
COLOURS = {7: (230, 60, 40), 3: (40, 90, 230)}


def draw_scene(rng: np.random.Generator, side: int, num_instances: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Discs and boxes that do not overlap on a dim noisy ground, and their annotations without ids."""
    image = rng.integers(60, 100, size=(side, side, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:side, :side]
    taken = np.zeros((side, side), dtype=bool)
    annotations: list[dict[str, Any]] = []
    while len(annotations) < num_instances:
        radius = int(rng.integers(side // 12, side // 6))
        y, x = rng.integers(radius + 1, side - radius - 1, size=2)
        category = [7, 3][len(annotations) % 2]
        if category == 7:
            mask = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        else:
            mask = (abs(rows - y) <= radius * 0.8) & (abs(columns - x) <= radius)
        if (taken & mask).any():
            continue
        taken |= mask
        image[mask] = COLOURS[category]
        rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation: Any = {"size": [side, side], "counts": rle["counts"].decode()}
        if category == 3:
            x0, y0, w, h = mask_util.toBbox(rle).tolist()
            segmentation = [[x0, y0, x0 + w, y0, x0 + w, y0 + h, x0, y0 + h]]
        annotations.append(
            {
                "category_id": category,
                "bbox": mask_util.toBbox(rle).tolist(),
                "area": float(mask_util.area(rle)),
                "iscrowd": 0,
                "segmentation": segmentation,
            }
        )
    return image, annotations


class Scenes:
    """A folder of scenes and its json; ``overrides`` names both for the tool, as training and validation data."""

    def __init__(self, folder: Path, *, num_images: int, side: int, num_instances: int = 4, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        self.json = folder / "instances.json"
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": copy.deepcopy(CATEGORIES)}
        for number in range(num_images):
            image, annotations = draw_scene(rng, side, num_instances)
            name = f"{number:03d}.png"
            Image.fromarray(image).save(self.images / name)
            self.content["images"].append({"id": 10 * number, "file_name": name, "height": side, "width": side})
            for annotation in annotations:
                ids = {"id": len(self.content["annotations"]) + 1, "image_id": 10 * number}
                self.content["annotations"].append({**annotation, **ids})
        self.write()

    def write(self) -> None:
        self.json.write_text(json.dumps(self.content))

    @property
    def overrides(self) -> list[str]:
        return [
            f"dataset.{part}.{key}={value}"
            for part in ("train", "val")
            for key, value in (("json", self.json), ("images", self.images))
        ]


@pytest.fixture
def make_scenes(tmp_path: Path) -> Callable[..., Scenes]:
    """``make_scenes(num_images=…, side=…)`` -> Scenes in a folder of the test's own."""

    def make(name: str = "scenes", **arguments: Any) -> Scenes:
        return Scenes(tmp_path / name, **arguments)

    return make
