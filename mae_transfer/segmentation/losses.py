"""Losses by name, and weights of classes.

Cross entropy (also of the hard pixels alone) is MMSegmentation's. Its Dice loss is not used: pixels labelled "ignored"
count in the sums of its predictions (its ``ignore_index`` is a channel, not a label), all classes of an image share one
ratio, so that the largest decides it, and it refuses the weights of a pixel sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class MAEDiceLoss(nn.Module):
    """Soft Dice of every class that occurs in an image, on its labelled pixels (Milletari et al. 2016).

    1 − (2 Σ p·t + ε) / (Σ p² + Σ t² + ε), with sums over an image's labelled pixels, p the softmax and t the labels;
    averaged over the classes that the image's labels hold, then over images. An image without labels counts 0.

    Args:
        loss_weight: factor.
        eps: ε, in pixels.
        loss_name: under which MMSegmentation's heads log it.
    """

    def __init__(self, loss_weight: float = 1.0, eps: float = 1.0, loss_name: str = "loss_dice") -> None:
        super().__init__()
        self.loss_weight, self.eps, self.loss_name = loss_weight, eps, loss_name

    def forward(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, ignore_index: int = 255, **_: Any
    ) -> Tensor:
        """(N, classes, H, W) and (N, H, W) -> a number.

        ``weight``, a sampler's choice of hard pixels, is for losses that are means over pixels; here it is left out.
        """
        num_classes = logits.shape[1]
        counted = (labels != ignore_index).flatten(1)  # (N, H·W)
        index = torch.where(counted, labels.flatten(1), 0)
        likely = logits.float().softmax(dim=1).flatten(2)  # (N, classes, H·W)
        pixels = counted.to(likely)

        def by_class(values: Tensor) -> Tensor:
            """(N, H·W) summed by label: (N, classes)."""
            return likely.new_zeros(len(likely), num_classes).scatter_add(1, index, values * pixels)

        overlap = by_class(likely.gather(1, index[:, None])[:, 0])
        labelled = by_class(pixels)
        predicted = torch.einsum("ncp,np->nc", likely.square(), pixels)
        ratio = (2 * overlap + self.eps) / (predicted + labelled + self.eps)
        present = (labelled > 0).to(ratio)
        by_image = ((1 - ratio) * present).sum(1) / present.sum(1).clamp(min=1)
        return self.loss_weight * by_image.mean()


def balanced_weights(counts: Sequence[int] | np.ndarray) -> tuple[float, ...]:
    """Weights of classes from their numbers of pixels: 1 / ln(1.02 + share), ENet's (Paszke et al. 2016).

    They are scaled so that their mean over pixels is 1, which leaves the loss, and the learning rate that suits it, of
    the same size. A class weighs at most some 35 times as much as another, however rare it is.
    """
    pixels = np.asarray(counts, dtype=np.float64)
    share = pixels / max(pixels.sum(), 1.0)
    raw = 1.0 / np.log(1.02 + share)
    return tuple((raw / max(float((raw * share).sum()), 1e-12)).tolist()) if pixels.sum() else (1.0,) * len(pixels)
