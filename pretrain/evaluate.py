"""The pretraining loss on unseen images, beside what needs no learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.source import CachedImages, ImageFolder
from mae_transfer.data.transforms import normalise
from mae_transfer.engine.precision import Precision
from pretrain.baseline import BaselineLosses, baseline_losses
from pretrain.images import MaskedBatch, fixed_batch
from pretrain.masking import MaskSampler
from pretrain.model import MaskedAutoencoder


def choose_images(num_images: int, *, limit: int, seed: int) -> list[int]:
    """At most ``limit`` of the images, spread over all folders: a random choice that depends on the seed alone."""
    if num_images <= limit:
        return list(range(num_images))
    words = Draws(seed=seed, purpose=Purpose.EVALUATION_CHOICE).words(num_images)
    return sorted(np.argsort(words, kind="stable")[:limit].tolist())


def _batches(
    source: ImageFolder | CachedImages, indices: Sequence[int], size: tuple[int, int], sampler: MaskSampler, seed: int
) -> Iterator[MaskedBatch]:
    for start in range(0, len(indices), 64):
        yield fixed_batch(source, indices=indices[start : start + 64], size=size, sampler=sampler, seed=seed)


@torch.inference_mode()
def evaluate_loss(
    model: MaskedAutoencoder,
    source: ImageFolder | CachedImages,
    *,
    indices: Sequence[int],
    sampler: MaskSampler,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
    seed: int,
) -> float:
    """Mean loss over the images ``indices``, each with a mask that is the same every time.

    Images are not augmented: the largest centred box of the model's aspect ratio, resized.
    """
    total = 0.0
    for batch in _batches(source, indices, model.image_size, sampler, seed):
        images = normalise(batch.images.to(precision.device), mean, std)
        with precision.autocast():
            loss = model(images, batch.noise.to(precision.device), mask_ratio=sampler.ratio).loss
        total += loss.item() * len(images)
    return total / len(indices)


@torch.inference_mode()
def evaluate_baselines(
    model: MaskedAutoencoder,
    source: ImageFolder | CachedImages,
    *,
    indices: Sequence[int],
    sampler: MaskSampler,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> BaselineLosses:
    """The trivial predictors on the very images and masks of ``evaluate_loss``; the model lends its patches only."""
    totals = np.zeros(len(dataclasses.fields(BaselineLosses)))
    for batch in _batches(source, indices, model.image_size, sampler, seed):
        images = normalise(batch.images, mean, std)
        order = batch.noise.argsort(dim=1, stable=True)
        mask = torch.ones_like(batch.noise).scatter_(1, order[:, : sampler.num_visible], 0.0)
        losses = baseline_losses(model.patchify(images), mask, model.grid, normalised=model.norm_pix_loss)
        totals += np.array(dataclasses.astuple(losses)) * len(images)
    return BaselineLosses(
        **{
            field.name: float(total / len(indices))
            for field, total in zip(dataclasses.fields(BaselineLosses), totals, strict=True)
        }
    )
