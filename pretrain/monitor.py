"""What a run shows of itself: the loss on unseen images, pictures of a few of them, and a linear probe."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from mae_transfer.data.batches import UnreadableCount, open_images
from mae_transfer.data.choice import choose_images, matching_labels
from mae_transfer.data.find import open_source
from mae_transfer.data.settings import folders
from mae_transfer.data.source import Source
from mae_transfer.engine.metrics import require_wandb
from mae_transfer.engine.parallel import is_sharded
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.trainer import Hook
from mae_transfer.probe import fit_probe, top_accuracies
from pretrain.evaluate import encode_images, evaluate_loss
from pretrain.images import fixed_batch
from pretrain.objective import PretrainRun
from pretrain.reconstruct import save_training_reconstructions

logger = logging.getLogger(__name__)


def monitors(run: PretrainRun, folder: RunFolder) -> list[Hook]:
    """The hooks that a run's config asks for. Pictures are of training images where there are no others.

    Raises:
        ConfigError: W&B is wanted and not installed; labels that a probe cannot use. DataError: images not found.
    """
    data, log, probe = run.config.data, run.config.log, run.config.probe
    if log.wandb is not None:
        require_wandb()
    unseen = open_images(data, data.val_roots) if data.val_roots else None
    hooks = []
    if unseen is not None and log.evaluate_every_epochs:
        hooks.append(_evaluation(run, unseen))
    if probe.train_path is not None and probe.every_epochs:
        hooks.append(_probe(run))
    if log.reconstruct_every_epochs:
        hooks.append(_pictures(run, unseen or run.source, folder))
    return hooks


def _evaluation(run: PretrainRun, source: Source) -> Hook:
    log, seed = run.config.log, run.config.run.seed
    chosen = choose_images(len(source), limit=log.evaluate_images, seed=seed)
    unreadable = UnreadableCount(num_samples=len(source), limit=run.config.data.max_unreadable)

    def evaluate(step: int) -> Mapping[str, float]:
        loss = evaluate_loss(
            run.model,
            source,
            indices=chosen,
            sampler=run.sampler,
            mean=run.mean,
            std=run.std,
            precision=run.precision,
            seed=seed,
            unreadable=unreadable,
            processes=run.processes,
        )
        logger.info("step %d: loss on %d unseen images %.4f", step, len(chosen), loss)
        return {"val_loss": loss}

    return Hook(every_steps=run.every(log.evaluate_every_epochs), run=evaluate)


def _pictures(run: PretrainRun, source: Source, folder: RunFolder) -> Hook:
    """The same few images under the same masks every time; every process computes them, one writes them."""
    log, seed = run.config.log, run.config.run.seed
    chosen = choose_images(len(source), limit=log.reconstruct_images, seed=seed)
    batch = fixed_batch(source, indices=chosen, size=run.config.data.size, sampler=run.sampler, seed=seed)

    def reconstruct(step: int) -> Mapping[str, float]:
        if run.processes.is_main:
            folder.reconstructions.mkdir(parents=True, exist_ok=True)
        save_training_reconstructions(
            run.model,
            run.to_device(batch.images),
            batch.noise.to(run.processes.device),
            mean=run.mean,
            std=run.std,
            path=folder.reconstructions / f"step-{step:08d}.png" if run.processes.is_main else None,
        )
        return {}

    return Hook(every_steps=run.every(log.reconstruct_every_epochs), run=reconstruct)


def _probe(run: PretrainRun) -> Hook:
    """A linear probe of the encoder as it is: fitted anew each time, on features that no gradient flows into.

    It keeps nothing and draws nothing, so a run is the same to the last bit with and without it, resumed or not.
    """
    config, data, seed = run.config.probe, run.config.data, run.config.run.seed
    train, val = (
        open_source(folders(path), channels=data.channels, floats=data.own_statistics, cache=data.scan_cache_folder)
        for path in (config.train_path, config.val_path)
    )
    labels = matching_labels(train, val, keys=("probe.train_path", "probe.val_path"))
    chosen = [choose_images(len(source), limit=config.images, seed=seed) for source in (train, val)]
    counts = [UnreadableCount(num_samples=len(source), limit=data.max_unreadable) for source in (train, val)]
    fitted_on, tested_on = (
        torch.from_numpy(own[indices]).to(run.processes.device) for own, indices in zip(labels, chosen, strict=True)
    )
    num_classes = int(max(own.max() for own in labels)) + 1
    if is_sharded(run.model):
        register_fsdp_forward_method(run.model, "forward_features")

    def probe(step: int) -> Mapping[str, float]:
        before = time.perf_counter()
        features: list[Tensor] = [
            encode_images(
                run.model,
                source,
                indices=indices,
                mean=run.mean,
                std=run.std,
                precision=run.precision,
                seed=seed,
                unreadable=count,
                processes=run.processes,
            )
            for source, indices, count in zip((train, val), chosen, counts, strict=True)
        ]
        encoded = time.perf_counter() - before
        if not run.processes.is_main:
            return {}
        own, unseen = (part.to(run.processes.device) for part in features)
        fitted = fit_probe(own, fitted_on, num_classes=num_classes)
        top1, top5 = top_accuracies(fitted.logits(unseen), tested_on)
        seconds = time.perf_counter() - before
        logger.info(
            "step %d: linear probe on %d images top-1 %.2f %%, top-5 %.2f %% of %d (%.1f s, of which features %.1f s)",
            *(step, len(own), top1, top5, len(unseen), seconds, encoded),
        )
        return {"probe_top1": top1, "probe_top5": top5, "probe_seconds": seconds}

    return Hook(every_steps=run.every(config.every_epochs), run=probe)
