"""Mask samplers: exact counts, right ratios, reproducible, and each of its own kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_transfer.errors import ConfigError
from pretrain.masking import box_mask, build_sampler, mask_from_noise, noise_from_mask, num_visible


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["random", "block", "grid"]),
    h=st.integers(2, 15),
    w=st.integers(2, 15),
    seed=st.integers(0, 2**32),
)
def test_every_sampler_keeps_exactly_k(kind: str, h: int, w: int, seed: int) -> None:
    sampler = build_sampler(kind, (h, w), 0.75)
    noise = sampler.noise(rng(seed))
    assert noise.shape == (h * w,) and noise.dtype == np.float32
    mask = sampler.mask(rng(seed))
    assert (~mask).sum() == int(h * w * 0.25) == sampler.num_visible
    assert np.array_equal(mask, sampler.mask(rng(seed))), "a mask is a function of the generator"


def test_published_count() -> None:
    assert num_visible(196, 0.75) == 49
    assert num_visible(256, 0.75) == 64


def test_random_marginals_are_uniform() -> None:
    sampler = build_sampler("random", (6, 7), 0.75)
    generator, draws = rng(1), 4000
    share = np.mean([sampler.mask(generator) for _ in range(draws)], axis=0)
    expected = 1 - sampler.num_visible / 42
    sigma = np.sqrt(expected * (1 - expected) / draws)
    assert np.abs(share - expected).max() < 5 * sigma
    # Pairs too: two neighbours are hidden together as often as any two patches are.
    masks = np.stack([sampler.mask(generator) for _ in range(draws)])
    together = (masks[:, 0] & masks[:, 1]).mean()
    hidden = 42 - sampler.num_visible
    assert together == pytest.approx(hidden * (hidden - 1) / (42 * 41), abs=5 * 0.5 / np.sqrt(draws))


def neighbours_alike(mask: np.ndarray) -> float:
    return float(((mask[1:] == mask[:-1]).mean() + (mask[:, 1:] == mask[:, :-1]).mean()) / 2)


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.75])
def test_block_masks_are_contiguous(ratio: float) -> None:
    grid = (14, 14)
    block, random = build_sampler("block", grid, ratio), build_sampler("random", grid, ratio)
    generator = rng(2)
    of_block = np.mean([neighbours_alike(block.mask(generator).reshape(grid)) for _ in range(50)])
    of_random = np.mean([neighbours_alike(random.mask(generator).reshape(grid)) for _ in range(50)])
    assert of_block > 0.8 > of_random
    # A hidden block of at least 4 x 2 patches or 2 x 4 stands in every mask (min_block is 16 at aspect 0.3 .. 3.3).
    for _ in range(20):
        mask = block.mask(generator).reshape(grid)
        windows = [
            np.lib.stride_tricks.sliding_window_view(mask, shape).all(axis=(2, 3)).any() for shape in ((4, 2), (2, 4))
        ]
        assert any(windows)


@pytest.mark.parametrize(("ratio", "step"), [(0.75, 2), (1 - 1 / 9, 3), (1 - 1 / 16, 4)])
def test_grid_masks_are_a_regular_lattice(ratio: float, step: int) -> None:
    grid = (12, 24)
    sampler = build_sampler("grid", grid, ratio)
    offsets = set()
    generator = rng(3)
    for _ in range(40 * step * step):
        rows, columns = np.nonzero(~sampler.mask(generator).reshape(grid))
        offset = (rows.min(), columns.min())
        offsets.add((int(offset[0]), int(offset[1])))
        expected = {(r, c) for r in range(offset[0], 12, step) for c in range(offset[1], 24, step)}
        assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert len(offsets) == step * step, "every offset occurs"


def test_grid_on_an_odd_grid_keeps_the_same_count() -> None:
    sampler = build_sampler("grid", (7, 7), 0.75)
    generator = rng(4)
    counts = {int((~sampler.mask(generator)).sum()) for _ in range(40)}
    assert counts == {12}


def test_noise_from_mask_is_the_mask() -> None:
    mask = rng(5).random(30) < 0.6
    noise = noise_from_mask(mask, rng(6))
    assert np.array_equal(mask_from_noise(noise, int((~mask).sum())), mask)


def test_box_masks_every_patch_it_touches() -> None:
    mask = box_mask((4, 6), (8, 8), (8, 9, 17, 24)).reshape(4, 6)
    expected = np.zeros((4, 6), dtype=bool)
    expected[1:3, 1:3] = True
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: build_sampler("grid", (14, 14), 0.7), r"nearest possible: 0.75 \(s=2\)"),
        (lambda: build_sampler("radom", (14, 14), 0.75), "did you mean random"),
        (lambda: build_sampler("random", (4, 4), 1.0), "leaves 0 of 16"),
        (lambda: build_sampler("random", (4, 4), 0.0), "leaves 16 of 16"),
        (lambda: box_mask((4, 4), (8, 8), (5, 5, 5, 9)), "is empty"),
        (lambda: box_mask((4, 4), (8, 8), (40, 0, 50, 9)), "touches no patch"),
        (lambda: box_mask((4, 4), (8, 8), (0, 0, 32, 32)), "touches every patch"),
    ],
)
def test_bad_input_is_named(call, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call()
