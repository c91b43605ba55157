from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as oracle

from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.transforms import Crop, apply_crop, centre_crop, denormalise, draw_crop, normalise
from tests.pictures import picture

SAMPLES = 3000


@pytest.mark.parametrize("image_size", [(64, 64), (375, 500), (40, 400)])  # the last one often falls back
def test_crops_are_distributed_as_torchvisions(image_size: tuple[int, int]) -> None:
    blank = torch.zeros(3, *image_size)
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(SAMPLES)], dtype=float
    )
    drawn = [
        draw_crop(Draws(seed=1, purpose=Purpose.CROP, index=index), image_size=image_size) for index in range(SAMPLES)
    ]
    ours = np.array([(crop.top, crop.left, crop.height, crop.width) for crop in drawn], dtype=float)
    for name, a, b in (
        *((name, ours[:, i], theirs[:, i]) for i, name in enumerate(("top", "left", "height", "width"))),
        ("area", ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        ("aspect", ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]),
    ):
        # Two-sample Kolmogorov-Smirnov; 1.95 is passed by one pair in a thousand.
        assert _largest_gap(a, b) < 1.95 * np.sqrt(2 / SAMPLES), name
    assert abs(np.mean([crop.flip for crop in drawn]) - 0.5) < 0.03


def _largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    points = np.union1d(a, b)
    return float(np.abs(_share_below(a, points) - _share_below(b, points)).max())


def _share_below(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), points, side="right") / len(values)


def test_every_crop_lies_inside() -> None:
    for index in range(500):
        height, width = 1 + index % 37, 1 + index % 23
        crop = draw_crop(Draws(seed=0, purpose=Purpose.CROP, index=index), image_size=(height, width))
        assert 0 <= crop.left <= crop.left + crop.width <= width and crop.width > 0
        assert 0 <= crop.top <= crop.top + crop.height <= height and crop.height > 0


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_are_torchvisions(flip: bool) -> None:
    image = picture(0, (75, 100))
    crop = Crop(left=13, top=7, width=61, height=40, flip=flip)
    ours = apply_crop(image, crop, size=(32, 48))
    theirs = oracle.resized_crop(image, 7, 13, 40, 61, [32, 48], interpolation=InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(ours, np.asarray(oracle.hflip(theirs) if flip else theirs))


def test_centre_crop_is_resize_then_crop_for_square_images_and_keeps_proportions() -> None:
    assert centre_crop(picture(0, (64, 64)), size=(32, 32)).shape == (32, 32, 3)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255  # exactly the centred square

    assert (centre_crop(Image.fromarray(wide), size=(16, 16)) == 255).all()


def test_normalise_is_torchvisions_and_denormalise_inverts_it() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalised = normalise(pixels, mean, std)
    torch.testing.assert_close(normalised, oracle.normalize(pixels.float() / 255, mean, std), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(denormalise(normalised, mean, std) * 255, pixels.float(), atol=1e-3, rtol=0)
