"""The pretraining run: the masked-autoencoding objective on the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_transfer.checkpoint import describe, encoder_state, write_safetensors
from mae_transfer.data.sampler import StepSampler, num_steps
from mae_transfer.data.source import CachedImages, ImageFolder
from mae_transfer.data.transforms import normalise
from mae_transfer.engine.checkpoints import load_checkpoint
from mae_transfer.engine.config import build_config, flatten, to_dict, to_yaml
from mae_transfer.engine.distribution import Processes, unwrap
from mae_transfer.engine.metrics import MetricsLog
from mae_transfer.engine.optimizer import build_adamw, decay_groups, warmup_cosine
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.run_folder import RunFolder, git_commit, open_run_folder
from mae_transfer.engine.trainer import Hook, Trainer
from mae_transfer.errors import ConfigError
from pretrain.config import PretrainConfig
from pretrain.evaluate import choose_images, evaluate_loss
from pretrain.images import MaskedBatch, MaskedImages, UnreadableCount, batch_stream, fixed_batch, open_images
from pretrain.masking import build_sampler
from pretrain.model import MaskedAutoencoder, build_mae
from pretrain.reconstruct import save_training_reconstructions

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: nothing that changes the losses.
_FREE_ON_RESUME = (
    *("run.dir", "run.resume", "run.overwrite", "checkpoint.", "log.", "data.workers", "data.cache", "data.path"),
    *("data.val_path", "data.max_unreadable", "train.max_skipped", "train.device"),
)


def build_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The masked autoencoder of a config, weights drawn from ``run.seed``."""
    torch.manual_seed(config.run.seed)
    return build_mae(
        size=config.model.size,
        image_size=config.data.size,
        patch_size=config.model.patch,
        channels=config.data.channels,
        mask_ratio=config.mask.ratio,
        norm_pix_loss=config.model.norm_pix_loss,
        mask_tokens_in_encoder=config.model.mask_tokens_in_encoder,
        checkpointing=config.model.checkpointing,
        **config.model.overrides,
    )


class PretrainRun:
    """Everything of a run but its folder: data, model, optimiser, schedule.

    Raises:
        DataError: no images. ConfigError: no length given, a warm-up longer than the run, a batch that does not
            divide among the processes.
    """

    def __init__(self, config: PretrainConfig, processes: Processes) -> None:
        self.config = config
        self.processes = processes
        batch_size = config.train.batch_size
        self.source = open_images(config.data, config.data.roots)
        self.val_source = open_images(config.data, config.data.val_roots) if config.data.val_roots else None
        self.num_samples = len(self.source)
        self.num_steps = self._num_steps()
        self.sampler = build_sampler(config.mask.kind, config.grid, config.mask.ratio)
        self.dataset = MaskedImages(self.source, data=config.data, sampler=self.sampler, seed=config.run.seed)
        self.mean, self.std = config.data.normalisation
        self.unreadable = UnreadableCount(num_samples=self.num_samples, limit=config.data.max_unreadable)
        self.schedule = warmup_cosine(
            peak=config.optim.peak_lr(batch_size),
            warmup_steps=round(config.optim.warmup_epochs * self.num_samples / batch_size),
            num_steps=self.num_steps,
            minimum=config.optim.min_lr,
        )
        self.precision = Precision(config.train.precision, processes.device)
        self.step_sampler(0)  # refuses an impossible division of the batch before anything is built
        self.model = build_model(config).to(processes.device)
        self.optimizer = build_adamw(decay_groups(self.model, config.optim.weight_decay), config.optim)

    def _num_steps(self) -> int:
        train = self.config.train
        if train.steps is not None:
            return train.steps
        if train.epochs is None:
            raise ConfigError("the length of the run is not set; give train.epochs=… or train.steps=…")
        return num_steps(epochs=train.epochs, num_samples=self.num_samples, batch_size=train.batch_size)

    def step_sampler(self, start_step: int) -> StepSampler:
        return StepSampler(
            num_samples=self.num_samples,
            batch_size=self.config.train.batch_size,
            seed=self.config.run.seed,
            start_step=start_step,
            stop_step=self.num_steps,
            accumulate=self.config.train.accumulate,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )

    def batches(self, start_step: int) -> Iterator[MaskedBatch]:
        return batch_stream(
            self.dataset,
            self.step_sampler(start_step),
            workers=self.config.data.workers,
            pin_memory=self.processes.device.type == "cuda",
            count=self.unreadable,
        )

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        """Mean squared error over the masked patches of a micro-batch."""
        images = self.to_device(batch.images)
        return model(images, batch.noise.to(self.processes.device, non_blocking=True)).loss

    def to_device(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to normalised float32 where the model is."""
        return normalise(images.to(self.processes.device, non_blocking=True), self.mean, self.std)

    def keep_inputs(self, step: int, folder: RunFolder) -> None:
        """Save what went into the step that ended as ``step``: it is drawn again, as it is a function of its keys."""
        keys = self.step_sampler(0).global_batch(step - 1)
        batch = self.dataset.__getitems__(keys)
        folder.nonfinite.mkdir(exist_ok=True)
        content = {
            "images": batch.images,
            "noise": batch.noise,
            "files": [str(self.source.paths[key.index]) for key in keys],
            "model": unwrap(self.model).state_dict(),
        }
        torch.save(content, folder.nonfinite / f"step-{step:08d}.pt")

    def every(self, epochs: float) -> int:
        """Steps in ``epochs`` epochs, at least one."""
        return max(1, round(epochs * self.num_samples / self.config.train.batch_size))

    def trainer(self, folder: RunFolder, metrics: MetricsLog | None) -> Trainer[MaskedBatch]:
        """The loop of this run, at its beginning and without hooks."""
        config = self.config
        return Trainer(
            model=self.model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            loss=self.loss,
            batches=self.batches,
            keep_inputs=self.keep_inputs,
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            train=config.train,
            precision=self.precision,
            checkpoint=config.checkpoint,
            log_every_steps=config.log.every_steps,
            clip_grad=config.optim.clip_grad,
            processes=self.processes,
            folder=folder,
            metrics=metrics,
            state={"config": to_dict(config.resolved()), "metadata": self.metadata()},
        )

    def hooks(self, folder: RunFolder) -> list[Hook]:
        """Loss on unseen images, and pictures of a few of them (of training images where there are no others)."""
        log, seed = self.config.log, self.config.run.seed
        hooks = []
        if self.val_source is not None and log.evaluate_every_epochs:
            source = self.val_source
            chosen = choose_images(len(source), limit=log.evaluate_images, seed=seed)

            def evaluate(step: int) -> dict[str, float]:
                loss = evaluate_loss(
                    self.model,
                    source,
                    indices=chosen,
                    sampler=self.sampler,
                    mean=self.mean,
                    std=self.std,
                    precision=self.precision,
                    seed=seed,
                )
                logger.info("step %d: loss on %d unseen images %.4f", step, len(chosen), loss)
                return {"val_loss": loss}

            hooks.append(Hook(every_steps=self.every(log.evaluate_every_epochs), run=evaluate))
        if log.reconstruct_every_epochs:
            batch = self.picture_batch(self.val_source or self.source)

            def reconstruct(step: int) -> dict[str, float]:
                path = folder.reconstructions / f"step-{step:08d}.png"
                save_training_reconstructions(
                    self.model,
                    self.to_device(batch.images),
                    batch.noise.to(self.processes.device),
                    mean=self.mean,
                    std=self.std,
                    path=path,
                )
                return {}

            hooks.append(Hook(every_steps=self.every(log.reconstruct_every_epochs), run=reconstruct))
        return hooks

    def picture_batch(self, source: ImageFolder | CachedImages) -> MaskedBatch:
        """The same few images and masks every time."""
        chosen = choose_images(len(source), limit=self.config.log.reconstruct_images, seed=self.config.run.seed)
        return fixed_batch(
            source, indices=chosen, size=self.config.data.size, sampler=self.sampler, seed=self.config.run.seed
        )

    def metadata(self) -> dict[str, str]:
        """What transfer needs to know of the encoder."""
        return describe(
            self.model,
            mean=tuple(self.mean),
            std=tuple(self.std),
            normalised_target=self.config.model.norm_pix_loss,
            decoder_num_heads=self.model.decoder_num_heads,
            git_commit=git_commit(),
        ).to_metadata()

    def write_weights(self, folder: RunFolder) -> None:
        """``model.safetensors`` and ``encoder.safetensors``."""
        state = self.model.state_dict()
        write_safetensors(folder.model, state, self.metadata())
        write_safetensors(folder.encoder, encoder_state(state), self.metadata())


def pretrain(config: PretrainConfig, processes: Processes) -> str | None:
    """Run, or continue, a pretraining to its end.

    Returns:
        None, or the name of the signal that stopped it (the state is saved).

    Raises:
        UserError: anything wrong with config or data, before training starts.
        RunFailed: too many unreadable images or steps that were not finite; the disk full.
    """
    run = PretrainRun(config, processes)  # first: a mistake in config or data leaves no folder behind
    folder, checkpoint = _open_folder(config, processes)
    state = load_checkpoint(checkpoint) if checkpoint is not None else None
    if state is not None:
        _check_same_run(state["config"], config)
    metrics = None
    if processes.is_main:
        folder.write_description(to_yaml(config.resolved()))
        if checkpoint is not None:
            _bring_metrics(checkpoint, folder, state["step"] if state else 0)
        metrics = MetricsLog(
            folder.metrics,
            last_step=state["step"] if state else 0,
            tensorboard=folder.tensorboard if config.log.tensorboard else None,
        )
    trainer = run.trainer(folder, metrics)
    trainer.hooks = run.hooks(folder)
    if state is not None:
        trainer.load_state_dict(state)
        logger.info("continuing from step %d of %d (%s)", trainer.step, run.num_steps, checkpoint)
    else:
        logger.info(
            "%d images, %d steps of %d, %s on %s, writing to %s",
            *(run.num_samples, run.num_steps, config.train.batch_size, config.train.precision),
            *(processes.device, folder.root),
        )
    try:
        stopped_by = trainer.run()
    finally:
        if metrics is not None:
            metrics.close()
    if stopped_by is None and processes.is_main:
        run.write_weights(folder)
    processes.barrier()
    return stopped_by


def _open_folder(config: PretrainConfig, processes: Processes) -> tuple[RunFolder, Path | None]:
    """The main process makes the folder; what it finds out, bad news included, holds for all of them."""
    if not processes.is_distributed:
        return open_run_folder(config.run)
    box: list[Any] = [None]
    if processes.is_main:
        try:
            box = [open_run_folder(config.run)]
        except ConfigError as error:
            box = [error]
    torch.distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], ConfigError):
        raise box[0]
    return box[0]


def _bring_metrics(checkpoint: Path, folder: RunFolder, step: int) -> None:
    """When a run goes on in another folder, its lines up to the checkpoint come along."""
    origin = checkpoint.parent.parent / "metrics.jsonl"
    if not folder.metrics.exists() and origin.is_file():
        folder.metrics.write_text(origin.read_text(encoding="utf-8"), encoding="utf-8")


def _check_same_run(before: dict[str, Any], config: PretrainConfig) -> None:
    """Raises ConfigError where a key that changes the losses differs from the checkpoint's."""
    # Read back through the schema, so that a key added since the checkpoint was written stands at its default.
    now, then = flatten(to_dict(config.resolved())), flatten(to_dict(build_config(PretrainConfig, before).resolved()))
    changed = [
        f"{key} was {then[key]}, is {now[key]}"
        for key in sorted(now)
        if now[key] != then[key] and not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"this is not a continuation of the same run: {'; '.join(changed)}. Give the same values, or start a new "
            "run in another run.dir"
        )
