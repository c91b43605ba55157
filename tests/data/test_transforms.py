from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as oracle

from mae_transfer.data.decode import Pixels, open_picture
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.transforms import Crop, apply_crop, centre_crop, cut, denormalise, draw_crop, normalise
from mae_transfer.errors import DataError
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
    # Joint distribution of place and size, by a chi-square test over quartiles of each: 4 x 4 x 4 cells.
    edges = [np.quantile(theirs[:, i], [0.25, 0.5, 0.75]) for i in (0, 1, 3)]
    counts = []
    for values in (ours, theirs):
        cells = np.stack([np.searchsorted(edge, values[:, i]) for edge, i in zip(edges, (0, 1, 3), strict=True)])
        counts.append(np.bincount(np.ravel_multi_index(cells, (4, 4, 4)), minlength=64))
    filled = np.array(counts)[:, np.sum(counts, axis=0) >= 20]
    assert chi2_contingency(filled).pvalue > 1e-3


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


def pillow_crop(image: Image.Image, crop: Crop, size: tuple[int, int], *, across_first: bool = False) -> np.ndarray:
    """torchvision's resized_crop of a Pillow image: the oracle.

    ``across_first``: one direction at a time, in the order that Pillow had for itself up to version 12.
    """
    image = oracle.crop(image, crop.top, crop.left, crop.height, crop.width)
    for shape in [(crop.height, size[1]), size] if across_first else [size]:
        image = oracle.resize(image, list(shape), interpolation=InterpolationMode.BICUBIC)
    return np.asarray(oracle.hflip(image) if crop.flip else image).reshape(*size, -1)


def differences(
    image: Image.Image, size: tuple[int, int], *, count: int, seed: int, across_first: bool = True
) -> tuple[int, float]:
    """Largest and mean difference in pixel values from Pillow over ``count`` crops."""
    largest, means = 0, []
    for index in range(count):
        draws = Draws(seed=seed, purpose=Purpose.CROP, index=index)
        crop = draw_crop(draws, image_size=(image.height, image.width))
        ours = apply_crop(image, crop, size=size)
        theirs = pillow_crop(image, crop, size, across_first=across_first)
        assert ours.shape == theirs.shape and ours.dtype == np.uint8
        gap = np.abs(ours.astype(int) - theirs)
        largest, means = max(largest, int(gap.max())), [*means, gap.mean()]
    return largest, float(np.mean(means))


# What the documentation promises: 2 of 255 at most, a fiftieth on average.
LARGEST, MEAN = 2, 0.02


@pytest.mark.parametrize("image_size", [(375, 500), (75, 100), (500, 90)])  # the crops shrink, grow, and do both
@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_agree_with_pillow_within_the_stated_tolerance(
    image_size: tuple[int, int], size: tuple[int, int], mode: str
) -> None:
    rng = np.random.default_rng(0)
    # The hardest there is: noise over the whole range, where every pass clips.
    noise = Image.fromarray(rng.integers(0, 256, (*image_size, 3), dtype=np.uint8)).convert(mode)
    for image in (picture(0, image_size).convert(mode), noise):
        largest, mean = differences(image, size, count=12, seed=3)
        assert largest <= LARGEST and mean <= MEAN


def test_pixels_agree_with_pillow_on_real_photos(real_data: Path) -> None:
    for seed, path in enumerate(sorted((real_data / "coco128").rglob("*.jpg"))[:12]):
        with Image.open(path) as image:
            largest, mean = differences(image.convert("RGB"), (224, 224), count=4, seed=seed)
            assert largest <= LARGEST and mean <= MEAN
            # In whatever order the installed Pillow goes.
            largest, mean = differences(image.convert("RGB"), (224, 224), count=4, seed=seed, across_first=False)
            assert largest <= 16 and mean <= 0.3


@pytest.mark.parametrize("channels", [2, 4, 5, 7])
def test_channels_are_resized_each_by_itself(channels: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (90, 70, channels), dtype=np.uint8)
    crop = Crop(left=3, top=5, width=60, height=80, flip=True)
    ours = apply_crop(pixels, crop, size=(32, 48)).astype(int)
    for channel in range(channels):
        theirs = pillow_crop(Image.fromarray(pixels[:, :, channel]), crop, (32, 48), across_first=True)
        assert np.abs(ours[:, :, channel] - theirs[:, :, 0]).max() <= LARGEST


def test_sixteen_bits_and_floats_keep_their_type_and_precision() -> None:
    values = np.random.default_rng(2).random((90, 70, 5), dtype=np.float32)
    crop = Crop(left=3, top=5, width=60, height=80, flip=False)
    exact = apply_crop(values, crop, size=(32, 48))
    assert exact.dtype == np.float32
    for channel in range(5):
        image = Image.fromarray(np.ascontiguousarray(values[:, :, channel]))  # mode F: Pillow's own float resizing
        np.testing.assert_allclose(exact[:, :, channel], pillow_crop(image, crop, (32, 48))[:, :, 0], atol=1e-5)
    deep = apply_crop((values * 65535).round().astype(np.uint16), crop, size=(32, 48))
    assert deep.dtype == np.uint16
    np.testing.assert_allclose(deep / 65535, exact.clip(0, 1), atol=2e-5)


def test_values_that_are_not_finite_make_an_image_unreadable() -> None:
    values = np.ones((20, 20, 2), np.float32)
    values[10, 10, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        apply_crop(values, Crop(left=0, top=0, width=20, height=20, flip=False), size=(8, 8))


def test_a_cut_is_the_crop_of_the_decoded_image_and_decodes_once() -> None:
    decoded = []

    class Counting(Pixels):
        def decode(self, *, bottom: int | None = None, shrink: int = 1) -> np.ndarray:
            decoded.append((bottom, shrink))
            return super().decode(bottom=bottom, shrink=shrink)

    pixels = np.asarray(picture(0, (75, 100)))
    crops = [Crop(left=13, top=7, width=61, height=40, flip=flip) for flip in (False, True)]
    for made, crop in zip(cut(Counting(pixels), crops, size=(32, 48)), crops, strict=True):
        np.testing.assert_array_equal(made.numpy(), apply_crop(pixels, crop, size=(32, 48)))
    assert decoded == [(47, 1)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_large_photos_are_shrunk_while_decoding_within_the_stated_tolerance(mode: str) -> None:
    """Where more than twice the pixels wanted are left, the decoder halves: the picture stays the same to the eye."""
    image = picture(3, (900, 1200)).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    photo = open_picture(file.getvalue(), name="photo")
    with Image.open(file) as decoded:
        for index in range(6):
            draws = Draws(seed=7, purpose=Purpose.CROP, index=index)
            crop = draw_crop(draws, image_size=(900, 1200))
            (ours,) = cut(photo, [crop], size=(64, 64))
            gap = np.abs(ours.numpy().astype(int) - pillow_crop(decoded, crop, (64, 64)))
            assert gap.mean() < 1 and gap.max() <= 12


def test_centre_crop_is_resize_then_crop_for_square_images_and_keeps_proportions() -> None:
    assert centre_crop(picture(0, (64, 64)), size=(32, 32)).shape == (32, 32, 3)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255  # exactly the centred square

    assert (centre_crop(Image.fromarray(wide), size=(16, 16)) == 255).all()


@pytest.mark.parametrize(("dtype", "whole"), [(torch.uint8, 255), (torch.uint16, 65535), (torch.float32, 1)])
def test_the_type_of_pixels_says_their_range(dtype: torch.dtype, whole: int) -> None:
    shares = torch.tensor([0.0, 0.2, 0.6, 1.0]).view(1, 1, 2, 2)
    pixels = shares if whole == 1 else (shares * whole).round().to(dtype)
    torch.testing.assert_close(normalise(pixels, [0.5], [0.25]), (shares - 0.5) / 0.25)


def test_normalise_is_torchvisions_and_denormalise_inverts_it() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalised = normalise(pixels, mean, std)
    torch.testing.assert_close(normalised, oracle.normalize(pixels.float() / 255, mean, std), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(denormalise(normalised, mean, std) * 255, pixels.float(), atol=1e-3, rtol=0)
