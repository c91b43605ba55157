"""The pretraining loss on unseen images, beside what needs no learning; features of images for the linear probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mae_transfer.data.batches import UnreadableCount, fixed_images
from mae_transfer.data.choice import BATCH, choose_images, shares
from mae_transfer.data.find import open_source
from mae_transfer.data.source import Source
from mae_transfer.data.transforms import normalise
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.precision import Precision
from mae_transfer.errors import ConfigError
from pretrain.baseline import BaselineLosses, baseline_losses
from pretrain.config import PretrainConfig
from pretrain.images import fixed_batch
from pretrain.load import load_mae
from pretrain.masking import MaskSampler, build_sampler
from pretrain.model import MaskedAutoencoder


@torch.no_grad()
def evaluate_loss(
    model: MaskedAutoencoder,
    source: Source,
    *,
    indices: Sequence[int],
    sampler: MaskSampler,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
    seed: int,
    unreadable: UnreadableCount,
    processes: Processes,
) -> float:
    """Mean loss over the images ``indices``, each with a mask that is the same every time.

    Images are not augmented: the largest centred box of the model's aspect ratio, resized. Processes share the images
    and all get the result; every one of them must call this.

    Args:
        model: in evaluation mode.

    Raises:
        RunFailed: more unreadable images than ``unreadable`` allows.
    """
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, images
    for places, counts in shares(len(indices), processes):
        batch = fixed_batch(
            source, indices=[indices[i] for i in places], size=model.image_size, sampler=sampler, seed=seed
        )
        unreadable.add(batch.unreadable)
        images = normalise(batch.images.to(precision.device), mean, std)
        with precision.autocast():
            loss = model(images, batch.noise.to(precision.device), mask_ratio=sampler.ratio).loss
        if counts:
            total += torch.tensor([loss.item() * len(images), len(images)], dtype=torch.float64)
    loss_sum, num_images = processes.sum(total).tolist()
    return loss_sum / num_images


@torch.no_grad()
def encode_images(
    model: MaskedAutoencoder,
    source: Source,
    *,
    indices: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
    seed: int,
    unreadable: UnreadableCount,
    processes: Processes,
) -> Tensor:
    """The cls token of the unmasked images ``indices`` after the encoder's last norm: (n, D) float32 on the CPU.

    Uncropped and shared among processes as in ``evaluate_loss``; every process gets all of it.

    Raises:
        RunFailed: more unreadable images than ``unreadable`` allows.
    """
    features = torch.zeros(len(indices), model.width)
    for places, counts in shares(len(indices), processes):
        pixels, broken = fixed_images(source, indices=[indices[i] for i in places], size=model.image_size, seed=seed)
        unreadable.add(broken)
        with precision.autocast():
            encoded = model.forward_features(normalise(pixels.to(precision.device), mean, std))
        if counts:
            features[places.start : places.stop] = encoded[:, 0].float().cpu()
    return processes.sum(features)  # rows of others are zero here


def evaluate_checkpoint(config: PretrainConfig, checkpoint: str, processes: Processes) -> str:
    """What ``tools/pretrain.py --evaluate`` prints: losses of a model and of the trivial predictors on unseen images.

    Processes share the images; each must call this.

    Raises:
        ConfigError: no ``data.val_path``. CheckpointError, DataError: as reading them.
    """
    if not config.data.val_roots:
        raise ConfigError("data.val_path is not set; name the folder of unseen images: data.val_path=FOLDER")
    loaded = load_mae(checkpoint)
    model, info = loaded.model, loaded.info
    data = config.data
    source = open_source(
        data.val_roots, channels=info.channels, floats=data.own_statistics, cache=data.scan_cache_folder
    )
    sampler = build_sampler(config.mask.kind, model.grid, config.mask.ratio)
    indices = choose_images(len(source), limit=config.log.evaluate_images, seed=config.run.seed)
    baselines = evaluate_baselines(
        model, source, indices=indices, sampler=sampler, mean=info.mean, std=info.std, seed=config.run.seed
    )
    loss = evaluate_loss(
        model.to(processes.device),
        source,
        indices=indices,
        sampler=sampler,
        mean=info.mean,
        std=info.std,
        precision=Precision(config.train.precision, processes.device),
        seed=config.run.seed,
        unreadable=UnreadableCount(num_samples=len(source), limit=config.data.max_unreadable),
        processes=processes,
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
    source: Source,
    *,
    indices: Sequence[int],
    sampler: MaskSampler,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> BaselineLosses:
    """The trivial predictors on the very images and masks of ``evaluate_loss``; the model lends its patches only."""
    totals = np.zeros(len(dataclasses.fields(BaselineLosses)))
    for start in range(0, len(indices), BATCH):
        batch = fixed_batch(
            source, indices=indices[start : start + BATCH], size=model.image_size, sampler=sampler, seed=seed
        )
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
