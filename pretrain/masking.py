"""Which patches are hidden: random, block-wise and grid masking, and masks drawn by hand (MAE paper, Section 4.1).

A mask is given as *noise*: one number a patch, and the K patches with the smallest stay visible. Every sampler below
returns noise, so the model knows one kind of input only, and every image of a batch keeps exactly K patches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from mae_transfer.errors import ConfigError, nearest
from mae_transfer.position import Grid

Noise = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """K = int(L·(1 − ratio)): 49 of 196 at 0.75.

    Raises:
        ConfigError: a ratio that leaves no patch visible, or none masked.
    """
    visible = int(num_patches * (1 - mask_ratio))
    if not 1 <= visible < num_patches:
        raise ConfigError(
            f"mask ratio {mask_ratio} leaves {visible} of {num_patches} patches visible; "
            f"expected at least 1 visible and 1 masked (a ratio between {1 / num_patches:.3g} and "
            f"{1 - 1 / num_patches:.3g})"
        )
    return visible


class MaskSampler(ABC):
    """Draws the noise of one image.

    Args:
        grid: (h, w) patches.
        ratio: share of masked patches.
    """

    kind: str

    def __init__(self, grid: Grid, ratio: float) -> None:
        self.grid = grid
        self.ratio = ratio
        self.num_patches = grid[0] * grid[1]
        self.num_visible = num_visible(self.num_patches, ratio)

    @abstractmethod
    def noise(self, rng: np.random.Generator) -> Noise:
        """(L,) in row order; the K smallest are the visible patches. A function of ``rng`` alone."""

    def mask(self, rng: np.random.Generator) -> Mask:
        """(L,) bool, True = masked."""
        return mask_from_noise(self.noise(rng), self.num_visible)


def mask_from_noise(noise: Noise, visible: int) -> Mask:
    """(L,) bool, True = masked: all but the ``visible`` smallest, ties going to the earlier patch."""
    mask = np.ones(noise.shape, dtype=bool)
    mask[np.argsort(noise, kind="stable")[:visible]] = False
    return mask


def noise_from_mask(mask: Mask, rng: np.random.Generator) -> Noise:
    """Noise whose smallest entries are the patches that ``mask`` leaves visible, shuffled within each part.

    Keeping the K smallest of it trims or fills the mask at random to exactly K visible patches.
    """
    within = rng.random(mask.size, dtype=np.float32)
    return np.where(mask.reshape(-1), within + np.float32(1), within).astype(np.float32)


class RandomMask(MaskSampler):
    """Every set of K patches is equally likely; the paper's default."""

    kind = "random"

    def noise(self, rng: np.random.Generator) -> Noise:
        return rng.random(self.num_patches, dtype=np.float32)


class BlockMask(MaskSampler):
    """BEiT's block-wise masking (Bao et al. 2021, Algorithm 1), trimmed or filled at random to exactly K visible.

    Rectangles of at least ``min_block`` patches and an aspect ratio between 0.3 and 1/0.3 are masked until the
    wanted number is reached or no further rectangle fits.
    """

    kind = "block"

    def __init__(
        self, grid: Grid, ratio: float, *, min_block: int = 16, min_aspect: float = 0.3, attempts: int = 10
    ) -> None:
        super().__init__(grid, ratio)
        self.num_masked = self.num_patches - self.num_visible
        self.min_block = min(min_block, self.num_masked)
        self.log_aspect = (math.log(min_aspect), -math.log(min_aspect))
        self.attempts = attempts

    def noise(self, rng: np.random.Generator) -> Noise:
        mask = np.zeros(self.grid, dtype=bool)
        while (missing := self.num_masked - int(mask.sum())) > 0:
            if not self._mask_block(mask, missing, rng):
                break
        return noise_from_mask(mask.reshape(-1), rng)

    def _mask_block(self, mask: Mask, missing: int, rng: np.random.Generator) -> bool:
        """Mask one rectangle that adds between 1 and ``missing`` patches; False when no attempt found one."""
        h, w = self.grid
        for _ in range(self.attempts):
            area = rng.uniform(min(self.min_block, missing), max(self.min_block, missing))
            aspect = math.exp(rng.uniform(*self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height <= h and 0 < width <= w):
                continue
            top, left = int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1))
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - int(block.sum()) <= missing:
                block[:] = True
                return True
        return False


class GridMask(MaskSampler):
    """Keep one patch of every s × s, at an offset drawn for each image; ratio 1 − 1/s².

    On a grid that s does not divide the lattice may hold more or fewer than K patches; it is trimmed or filled at
    random, so that every image of a batch keeps K = int(L/s²).
    """

    kind = "grid"

    def __init__(self, grid: Grid, ratio: float) -> None:
        super().__init__(grid, ratio)
        step = round(1 / math.sqrt(1 - ratio))
        if step < 2 or abs(1 - 1 / step**2 - ratio) > 1e-6:
            near = sorted({max(2, step + d) for d in (-1, 0, 1)})
            raise ConfigError(
                f"grid masking keeps one patch of every s x s, so its ratio is 1 - 1/s^2; got {ratio}, "
                f"nearest possible: {', '.join(f'{1 - 1 / s**2:.6g} (s={s})' for s in near)}"
            )
        self.step = step

    def noise(self, rng: np.random.Generator) -> Noise:
        top, left = rng.integers(self.step, size=2)
        mask = np.ones(self.grid, dtype=bool)
        mask[top :: self.step, left :: self.step] = False
        return noise_from_mask(mask.reshape(-1), rng)


SAMPLERS: dict[str, type[MaskSampler]] = {sampler.kind: sampler for sampler in (RandomMask, BlockMask, GridMask)}


def build_sampler(kind: str, grid: Grid, ratio: float) -> MaskSampler:
    """The sampler called ``kind``: "random", "block" or "grid".

    Raises:
        ConfigError: no such kind, or a ratio it cannot hold.
    """
    if kind not in SAMPLERS:
        guess = nearest(kind, SAMPLERS)
        hint = f"; did you mean {guess}?" if guess else ";"
        raise ConfigError(f"unknown mask kind {kind!r}{hint} Kinds are: {', '.join(SAMPLERS)}")
    return SAMPLERS[kind](grid, ratio)


def box_mask(grid: Grid, patch_size: tuple[int, int], box: tuple[float, float, float, float]) -> Mask:
    """Mask by hand: every patch that the box touches.

    Args:
        grid: (h, w) patches.
        patch_size: (p, p) in pixels.
        box: x0, y0, x1, y1 in pixels of the model's input; x1 and y1 exclusive.

    Returns:
        (L,) bool, True = masked.

    Raises:
        ConfigError: a box without area inside the image, or that hides everything.
    """
    (h, w), (p_h, p_w) = grid, patch_size
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise ConfigError(f"mask box {box} is empty; expected x0,y0,x1,y1 with x0 < x1 and y0 < y1")
    rows = np.arange(h) * p_h
    columns = np.arange(w) * p_w
    inside = ((rows < y1) & (rows + p_h > y0))[:, None] & ((columns < x1) & (columns + p_w > x0))[None]
    if not inside.any() or inside.all():
        what = "no patch" if not inside.any() else "every patch"
        raise ConfigError(f"mask box {box} touches {what} of an image of {w * p_w}x{h * p_h} pixels; give another box")
    return inside.reshape(-1)
