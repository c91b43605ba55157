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
from mae_transfer.errors import ConfigError
from pretrain.baseline import BaselineLosses, baseline_losses
from pretrain.config import PretrainConfig
from pretrain.images import MaskedBatch, UnreadableCount, fixed_batch
from pretrain.load import load_mae
from pretrain.masking import MaskSampler, build_sampler
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
    unreadable: UnreadableCount,
) -> float:
    """Mean loss over the images ``indices``, each with a mask that is the same every time.

    Images are not augmented: the largest centred box of the model's aspect ratio, resized.

    Raises:
        RunFailed: more unreadable images than ``unreadable`` allows.
    """
    total = 0.0
    for batch in _batches(source, indices, model.image_size, sampler, seed):
        unreadable.add(batch.unreadable)
        images = normalise(batch.images.to(precision.device), mean, std)
        with precision.autocast():
            loss = model(images, batch.noise.to(precision.device), mask_ratio=sampler.ratio).loss
        total += loss.item() * len(images)
    return total / len(indices)


def evaluate_checkpoint(config: PretrainConfig, checkpoint: str, device: torch.device) -> str:
    """What ``tools/pretrain.py --evaluate`` prints: losses of a model and of the trivial predictors on unseen images.

    Raises:
        ConfigError: no ``data.val_path``. CheckpointError, DataError: as reading them.
    """
    if not config.data.val_roots:
        raise ConfigError("data.val_path is not set; name the folder of unseen images: data.val_path=FOLDER")
    loaded = load_mae(checkpoint)
    model, info = loaded.model, loaded.info
    source = ImageFolder(config.data.val_roots, channels=info.channels)
    sampler = build_sampler(config.mask.kind, model.grid, config.mask.ratio)
    indices = choose_images(len(source), limit=config.log.evaluate_images, seed=config.run.seed)
    baselines = evaluate_baselines(
        model, source, indices=indices, sampler=sampler, mean=info.mean, std=info.std, seed=config.run.seed
    )
    loss = evaluate_loss(
        model.to(device),
        source,
        indices=indices,
        sampler=sampler,
        mean=info.mean,
        std=info.std,
        precision=Precision(config.train.precision, device),
        seed=config.run.seed,
        unreadable=UnreadableCount(num_samples=len(source), limit=config.data.max_unreadable),
    )
    target = "pixels normalised patch by patch" if model.norm_pix_loss else "pixels"
    rows = {
        f"model ({loaded.path})": loss,
        "mean of visible neighbours, in the target's units": baselines.neighbours,
        "mean of visible neighbours' pixels, then normalised": baselines.neighbours_pixels,
        "zero everywhere": baselines.zero,
    }
    lines = [
        f"mean squared error over hidden patches ({target}), {len(indices)} images of "
        f"{', '.join(map(str, config.data.val_roots))}, {config.mask.kind} mask of {config.mask.ratio:.0%}, "
        f"seed {config.run.seed}"
    ]
    return "\n".join(lines + [f"{value:9.4f}  {name}" for name, value in rows.items()])


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
