"""What a model must beat: each masked patch predicted as the mean of its visible neighbours.

The loss is the model's own. With a target of normalised patches there are two readings, and both are given: average
the neighbours' pixels, then normalise by the masked patch's statistics as its target is; or average the neighbours'
own normalised patches, which is the fairer opponent, as a flat patch is not blown up by its small deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_transfer.position import Grid
from pretrain.model import patch_statistics


@dataclass(frozen=True, kw_only=True)
class BaselineLosses:
    """Mean squared error over masked patches, without any learning.

    Attributes:
        neighbours: the mean of the nearest visible neighbours' targets.
        neighbours_pixels: the mean of their pixels, put into the target's units; the same where it is plain pixels.
        zero: predicting 0 everywhere: the variance of the target, about 1 where it is normalised.
    """

    neighbours: float
    neighbours_pixels: float
    zero: float


def neighbour_mean(patches: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """For each patch the mean of the visible patches around it, place by place.

    The eight neighbours count; where none of them is visible the square grows by one ring at a time until one is.

    Args:
        patches: (N, L, V) pixel values.
        mask: (N, L), 1 = masked. At least one patch of every image is visible.

    Returns:
        (N, L, V).
    """
    n, _, values = patches.shape
    h, w = grid
    visible = (1 - mask.float()).reshape(n, 1, h, w)
    x = patches.float().transpose(1, 2).reshape(n, values, h, w) * visible
    result = torch.zeros_like(x)
    found = torch.zeros_like(visible, dtype=torch.bool)
    for radius in range(1, max(h, w)):
        if bool(found.all()):
            break
        count = _square_sum(visible, radius)
        mean = _square_sum(x, radius) / count.clamp(min=1)
        new = (count > 0.5) & ~found
        result = torch.where(new, mean, result)
        found |= new
    assert bool(found.all()), "an image without any visible patch"
    return result.reshape(n, values, h * w).transpose(1, 2)


def _square_sum(x: Tensor, radius: int) -> Tensor:
    """Sum over the (2·radius+1)² square around every place, outside counting as zero; the place itself included.

    A masked place adds nothing to its own square, and only masked places are asked for.
    """
    side = 2 * radius + 1
    return F.avg_pool2d(x, side, stride=1, padding=radius, count_include_pad=True) * side**2


def baseline_losses(patches: Tensor, mask: Tensor, grid: Grid, *, normalised: bool) -> BaselineLosses:
    """Losses of the two trivial predictors on a batch.

    Args:
        patches: (N, L, V) pixel values in the model's input normalisation.
        mask: (N, L), 1 = masked.
        normalised: the target is each patch less its mean over its standard deviation.
    """
    target = patches.float()
    pixels = neighbour_mean(target, mask, grid)
    prediction = pixels
    if normalised:
        mean, std = patch_statistics(target)
        target, pixels = (target - mean) / std, (pixels - mean) / std
        prediction = neighbour_mean(target, mask, grid)
    masked = mask.bool()

    def error(guess: Tensor) -> float:
        return (guess - target)[masked].square().mean().item()

    return BaselineLosses(
        neighbours=error(prediction), neighbours_pixels=error(pixels), zero=error(torch.zeros_like(target))
    )
