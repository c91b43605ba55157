"""Image files for tests: smooth random pictures, so that JPEG and resizing have something to work on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """An RGB picture of ``size`` (H, W): a few coloured waves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    waves = [
        sum(
            np.sin(rng.uniform(2, 25) * (x * np.cos(a) + y * np.sin(a)) + rng.uniform(0, 6))
            for a in rng.uniform(0, 3, 4)
        )
        for _ in range(3)
    ]
    pixels = np.stack(waves, axis=2)
    return Image.fromarray(((pixels - pixels.min()) / np.ptp(pixels) * 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (40, 48)) -> Path:
    """``count`` PNG files in ``folder``; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        picture(seed, size).save(folder / f"{seed:03d}.png")
    return folder
