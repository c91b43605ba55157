"""What a run shows of itself: the loss on unseen images, and pictures of a few of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mae_transfer.data.source import CachedImages, ImageFolder
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.trainer import Hook
from pretrain.evaluate import choose_images, evaluate_loss
from pretrain.images import UnreadableCount, fixed_batch, open_images
from pretrain.objective import PretrainRun
from pretrain.reconstruct import save_training_reconstructions

logger = logging.getLogger(__name__)


def monitors(run: PretrainRun, folder: RunFolder) -> list[Hook]:
    """The hooks that a run's config asks for. Pictures are of training images where there are no others."""
    data, log = run.config.data, run.config.log
    unseen = open_images(data, data.val_roots) if data.val_roots else None
    hooks = []
    if unseen is not None and log.evaluate_every_epochs:
        hooks.append(_evaluation(run, unseen))
    if log.reconstruct_every_epochs:
        hooks.append(_pictures(run, unseen or run.source, folder))
    return hooks


def _evaluation(run: PretrainRun, source: ImageFolder | CachedImages) -> Hook:
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
        )
        logger.info("step %d: loss on %d unseen images %.4f", step, len(chosen), loss)
        return {"val_loss": loss}

    return Hook(every_steps=run.every(log.evaluate_every_epochs), run=evaluate)


def _pictures(run: PretrainRun, source: ImageFolder | CachedImages, folder: RunFolder) -> Hook:
    """The same few images under the same masks every time."""
    log, seed = run.config.log, run.config.run.seed
    chosen = choose_images(len(source), limit=log.reconstruct_images, seed=seed)
    batch = fixed_batch(source, indices=chosen, size=run.config.data.size, sampler=run.sampler, seed=seed)

    def reconstruct(step: int) -> Mapping[str, float]:
        save_training_reconstructions(
            run.model,
            run.to_device(batch.images),
            batch.noise.to(run.processes.device),
            mean=run.mean,
            std=run.std,
            path=folder.reconstructions / f"step-{step:08d}.png",
        )
        return {}

    return Hook(every_steps=run.every(log.reconstruct_every_epochs), run=reconstruct)
