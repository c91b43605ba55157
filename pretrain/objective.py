"""The pretraining objective on the engine: data, model, optimiser, schedule and loss of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mae_transfer.checkpoint import describe, encoder_state
from mae_transfer.data.sampler import StepSampler, num_steps
from mae_transfer.data.source import Source
from mae_transfer.data.transforms import normalise
from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.engine.config import to_dict
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.files import write_torch, write_weights
from mae_transfer.engine.hardware import measured_gflops
from mae_transfer.engine.optimizer import build_adamw, decay_groups, warmup_cosine
from mae_transfer.engine.parallel import compile_blocks, parallelise
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.prefetch import prefetch
from mae_transfer.engine.run_folder import RunFolder, git_commit
from mae_transfer.engine.state import whole_state
from mae_transfer.engine.trainer import Trainer
from mae_transfer.errors import ConfigError
from pretrain.config import PretrainConfig
from pretrain.images import MaskedBatch, MaskedImages, UnreadableCount, batch_stream, open_images
from pretrain.masking import build_sampler
from pretrain.model import MaskedAutoencoder, build_mae
from pretrain.planner import training_flops


def build_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The masked autoencoder of a config, weights drawn from ``run.seed``."""
    torch.manual_seed(config.run.seed)
    return build_mae(**config.model_arguments)


class PretrainRun:
    """Everything of a run but its folder and its loop: data, model, schedule.

    Raises:
        DataError: no images. ConfigError: no length given, a warm-up longer than the run, a batch that does not
            divide among the processes.
    """

    def __init__(self, config: PretrainConfig, processes: Processes) -> None:
        self.config = config
        self.processes = processes
        batch_size = config.train.batch_size
        self.source = self._open_images()
        self.num_samples = len(self.source)
        self.epoch_samples = self.num_samples * config.data.repeats  # crops
        self.num_steps = self._num_steps()
        self.sampler = build_sampler(config.mask.kind, config.grid, config.mask.ratio)
        self.dataset = MaskedImages(self.source, data=config.data, sampler=self.sampler, seed=config.run.seed)
        self.mean, self.std = config.data.normalisation
        self.unreadable = UnreadableCount(num_samples=self.num_samples, limit=config.data.max_unreadable)
        self.schedule = warmup_cosine(
            peak=config.optim.peak_lr(batch_size),
            warmup_steps=round(config.optim.warmup_epochs * self.epoch_samples / batch_size),
            num_steps=self.num_steps,
            minimum=config.optim.min_lr,
        )
        self.precision = Precision(config.train.precision, processes.device)
        self.step_sampler(0)  # refuses an impossible division of the batch before anything is built
        if processes.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        if processes.device.type == "cpu":
            keep_freed_memory()
        self.model = build_model(config).to(processes.device)
        self.sample_flops = training_flops(self.model, mask_ratio=config.mask.ratio)

    def _open_images(self) -> Source:
        """The main process looks first: what a scan of a large folder finds is kept for the others."""
        data, found = self.config.data, []
        self.processes.on_main(lambda: found.append(open_images(data, data.roots)))
        return found[0] if found else open_images(data, data.roots)

    def count_unreadable(self) -> None:
        """Put together what the processes could not read; all of them call this.

        Raises:
            RunFailed: more than ``data.max_unreadable`` allows.
        """
        self.unreadable.merge(*self.processes.gather(sorted(self.unreadable.seen)))
        self.unreadable.check()

    def _num_steps(self) -> int:
        train = self.config.train
        if train.steps is not None:
            return train.steps
        if train.epochs is None:
            raise ConfigError("the length of the run is not set; give train.epochs=… or train.steps=…")
        return num_steps(
            epochs=train.epochs,
            num_samples=self.num_samples,
            batch_size=train.batch_size,
            repeats=self.config.data.repeats,
        )

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
            repeats=self.config.data.repeats,
        )

    def batches(self, start_step: int) -> Iterator[MaskedBatch]:
        """This process's micro-batches from a step on, on its device."""
        device = self.processes.device
        stream = batch_stream(
            self.dataset,
            self.step_sampler(start_step),
            workers=self.config.data.workers,
            pin_memory=device.type == "cuda",
            count=self.unreadable,
        )

        def move(batch: MaskedBatch) -> MaskedBatch:
            return replace(
                batch,
                images=batch.images.to(device, non_blocking=True),
                noise=batch.noise.to(device, non_blocking=True),
            )

        def used(batch: MaskedBatch) -> None:
            for tensor in (batch.images, batch.noise):
                tensor.record_stream(torch.cuda.current_stream(device))

        return prefetch(stream, device, move=move, used=used)

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        """Mean squared error over the masked patches of a micro-batch."""
        return model(self.to_device(batch.images), batch.noise).loss

    def to_device(self, images: Tensor) -> Tensor:
        """(N, C, H, W) as decoded to normalised float32 where the model is."""
        return normalise(images.to(self.processes.device, non_blocking=True), self.mean, self.std)

    def keep_inputs(self, step: int, folder: RunFolder) -> None:
        """Save what went into the step that ended as ``step``: it is drawn again, as it is a function of its keys."""
        weights = whole_state(self.model)
        if not self.processes.is_main:
            return
        keys = self.step_sampler(0).global_batch(step - 1)
        batch = self.dataset.__getitems__(keys)
        content = {
            "images": batch.images,
            "noise": batch.noise,
            "files": [self.source.name(key.index) for key in keys],
            "model": weights,
        }
        write_torch(folder.nonfinite / f"step-{step:08d}.pt", content)

    def every(self, epochs: float) -> int:
        """Steps in ``epochs`` epochs, at least one."""
        return max(1, round(epochs * self.epoch_samples / self.config.train.batch_size))

    def trainer(self, folder: RunFolder) -> Trainer[MaskedBatch]:
        """The loop of this run, at its beginning, without hooks and without a log.

        The model is compiled and spread over the processes here, in place, and the optimiser is built on its parts.
        """
        config, processes = self.config, self.processes
        if config.train.compile:
            compile_blocks(self.model)
        module = parallelise(self.model, processes, strategy=config.train.distributed)
        optimizer = build_adamw(decay_groups(self.model, config.optim.weight_decay), config.optim)
        ceiling = (config.log.peak_gflops or measured_gflops(processes.device, config.train.precision)) * 1e9
        return Trainer(
            model=self.model,
            module=module,
            optimizer=optimizer,
            schedule=self.schedule,
            loss=self.loss,
            batches=self.batches,
            keep_inputs=self.keep_inputs,
            before_save=self.count_unreadable,
            num_steps=self.num_steps,
            num_samples=self.epoch_samples,
            train=config.train,
            precision=self.precision,
            checkpoint=config.checkpoint,
            log_every_steps=config.log.every_steps,
            clip_grad=config.optim.clip_grad,
            processes=processes,
            folder=folder,
            seed=config.run.seed,
            sample_flops=self.sample_flops,
            peak_flops=float(processes.sum(torch.tensor(ceiling, dtype=torch.float64))),
            facts={"config": to_dict(config.resolved()), "metadata": self.metadata()},
        )

    def metadata(self) -> dict[str, str]:
        """What transfer needs to know of the encoder."""
        return describe(
            self.model,
            mean=tuple(self.mean),
            std=tuple(self.std),
            normalised_target=self.config.model.norm_pix_loss,
            decoder_num_heads=self.model.decoder_num_heads,
            positions=self.model.positions,
            cross_prediction_ratio=self.model.cross_prediction_ratio if self.model.decoder == "cross" else None,
            git_commit=git_commit(),
        ).to_metadata()

    def write_weights(self, folder: RunFolder, average: WeightAverage | None) -> None:
        """``model.safetensors`` and ``encoder.safetensors``, and both of the average where there is one."""
        self._write(folder.model, folder.encoder)
        if average is not None:
            with average.in_place():
                self._write(folder.average_model, folder.average_encoder)
        self.processes.barrier()

    def _write(self, model: Path, encoder: Path) -> None:
        state = whole_state(self.model)  # together: a process has only its part
        if self.processes.is_main:
            write_weights(model, state, self.metadata())
            write_weights(encoder, encoder_state(state), self.metadata())
