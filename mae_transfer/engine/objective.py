"""What a run trains on what: the part that pretraining and classification share.

An objective opens the images, says how long the run is, cuts its batches among processes and hands everything to the
trainer; a subclass brings the model, the loss and what a batch holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mae_transfer.checkpoint import encoder_state
from mae_transfer.checkpoint.lineage import lineage
from mae_transfer.data.batches import Batch, KeyedBatches, UnreadableCount, batch_stream
from mae_transfer.data.sampler import StepSampler, num_steps
from mae_transfer.data.settings import ImagesConfig
from mae_transfer.data.source import Source
from mae_transfer.data.transforms import normalise
from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.engine.checkpoints import CheckpointConfig, TrainingState
from mae_transfer.engine.config import to_dict
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.files import write_torch, write_weights
from mae_transfer.engine.hardware import measured_gflops
from mae_transfer.engine.metrics import LogConfig
from mae_transfer.engine.optimizer import OptimConfig, warmup_cosine
from mae_transfer.engine.parallel import compile_blocks, parallelise
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.prefetch import prefetch
from mae_transfer.engine.run_folder import RunConfig, RunFolder
from mae_transfer.engine.state import whole_state
from mae_transfer.engine.trainer import TrainConfig, Trainer
from mae_transfer.errors import ConfigError

BatchT = TypeVar("BatchT", bound=Batch)
LINEAGE = ("source", "license")  # what ``lineage`` says, of the metadata of weights


class RunSettings(Protocol):
    """The sections that every run's config has."""

    @property
    def data(self) -> ImagesConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def log(self) -> LogConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def init_checkpoint(self) -> str | None: ...

    def resolved(self) -> Any:
        """The same run with everything spelt out that other keys imply."""
        ...


class Objective(ABC, Generic[BatchT]):
    """Everything of a run but its folder and its loop: data, model, schedule.

    A subclass sets ``model``, ``dataset`` and ``sample_flops`` (of one image's training) in its ``__init__``.

    Args:
        source: the training images.
        optim: the optimiser's numbers; the schedule follows from them.

    Raises:
        ConfigError: no length given, a warm-up longer than the run, a batch that does not divide among the processes.
    """

    model: nn.Module
    dataset: KeyedBatches[BatchT]
    sample_flops: float
    takes_steps = True  # False: nothing is trained, and no batch has to divide among the processes
    _before: Mapping[str, str] | None = None  # metadata of the training state that the run goes on from

    def __init__(self, config: RunSettings, processes: Processes, *, source: Source, optim: OptimConfig) -> None:
        self.settings = config
        self.processes = processes
        self.source = source
        self.optim = optim
        batch_size = config.train.batch_size
        self.num_samples = len(source)
        self.epoch_samples = self.num_samples * config.data.repeats  # crops
        self.num_steps = self.count_steps()
        self.mean, self.std = config.data.normalisation
        self.unreadable = UnreadableCount(num_samples=self.num_samples, limit=config.data.max_unreadable)
        self.schedule = warmup_cosine(
            peak=optim.peak_lr(batch_size),
            warmup_steps=round(optim.warmup_epochs * self.epoch_samples / batch_size),
            num_steps=self.num_steps,
            minimum=optim.min_lr,
        )
        self.precision = Precision(config.train.precision, processes.device)
        if self.takes_steps:
            self.step_sampler(0)  # refuses an impossible division of the batch before anything is built
        if processes.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        if processes.device.type == "cpu":
            keep_freed_memory()

    # What a subclass brings.

    @abstractmethod
    def build_optimizer(self) -> torch.optim.Optimizer:
        """On the parameters as they are now, spread over processes or not."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: BatchT) -> Tensor:
        """The mean loss of a micro-batch; ``model`` is what to call, the wrapper of several processes included."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """What a reader of the weights needs to know of them."""

    # What all of them do alike.

    def count_unreadable(self) -> None:
        """Put together what the processes could not read; all of them call this.

        Raises:
            RunFailed: more than ``data.max_unreadable`` allows.
        """
        self.unreadable.merge(*self.processes.gather(sorted(self.unreadable.seen)))
        self.unreadable.check()

    def go_on_from(self, state: TrainingState) -> None:
        """Learn of the state that will be put back, before the trainer is built; all processes call this.

        Raises:
            ConfigError: it was trained on other data.
        """
        self._before = state.facts.get("metadata", {})

    @property
    def lineage(self) -> dict[str, str]:
        """Source and licence of the weights that the run began with; when it goes on, their file is not asked again."""
        if self._before is None:
            return lineage(self.settings.init_checkpoint)
        return {name: self._before[name] for name in LINEAGE if self._before.get(name, "null") != "null"}

    def count_steps(self) -> int:
        """The length of the run. Raises ConfigError where it is not given."""
        train = self.settings.train
        if train.steps is not None:
            return train.steps
        if train.epochs is None:
            raise ConfigError("the length of the run is not set; give train.epochs=… or train.steps=…")
        return num_steps(
            epochs=train.epochs,
            num_samples=self.num_samples,
            batch_size=train.batch_size,
            repeats=self.settings.data.repeats,
        )

    def step_sampler(self, start_step: int) -> StepSampler:
        return StepSampler(
            num_samples=self.num_samples,
            batch_size=self.settings.train.batch_size,
            seed=self.settings.run.seed,
            start_step=start_step,
            stop_step=self.num_steps,
            accumulate=self.settings.train.accumulate,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            repeats=self.settings.data.repeats,
        )

    def batches(self, start_step: int) -> Iterator[BatchT]:
        """This process's micro-batches from a step on, on its device."""
        device = self.processes.device
        stream = batch_stream(
            self.dataset,
            self.step_sampler(start_step),
            workers=self.settings.data.workers,
            pin_memory=device.type == "cuda",
            count=self.unreadable,
        )
        return prefetch(stream, device)

    def to_device(self, images: Tensor) -> Tensor:
        """(N, C, H, W) as decoded to normalised float32 where the model is."""
        return normalise(images.to(self.processes.device, non_blocking=True), self.mean, self.std)

    def keep_inputs(self, step: int, folder: RunFolder) -> None:
        """Save what went into the step that ended as ``step``: it is drawn again, as it is a function of its keys."""
        weights = whole_state(self.model)
        if not self.processes.is_main:
            return
        keys = self.step_sampler(0).global_batch(step - 1)
        content = {
            **self.dataset.__getitems__(keys).tensors(),
            "files": [self.source.name(key.index) for key in keys],
            "model": weights,
        }
        write_torch(folder.nonfinite / f"step-{step:08d}.pt", content)

    def every(self, epochs: float) -> int:
        """Steps in ``epochs`` epochs, at least one."""
        return max(1, round(epochs * self.epoch_samples / self.settings.train.batch_size))

    def trainer(self, folder: RunFolder) -> Trainer[BatchT]:
        """The loop of this run, at its beginning, without hooks and without a log.

        The model is compiled and spread over the processes here, in place, and the optimiser is built on its parts.
        """
        config, processes = self.settings, self.processes
        if config.train.compile:
            compile_blocks(self.model)
        module = parallelise(self.model, processes, strategy=config.train.distributed)
        ceiling = (config.log.peak_gflops or measured_gflops(processes.device, config.train.precision)) * 1e9
        return Trainer(
            model=self.model,
            module=module,
            optimizer=self.build_optimizer(),
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
            clip_grad=self.optim.clip_grad,
            processes=processes,
            folder=folder,
            seed=config.run.seed,
            sample_flops=self.sample_flops,
            peak_flops=float(processes.sum(torch.tensor(ceiling, dtype=torch.float64))),
            facts={"config": to_dict(config.resolved()), "metadata": self.metadata()},
        )

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


def open_once(opened: Callable[[], Source], processes: Processes) -> Source:
    """What ``opened`` opens. The main process looks first: what a scan of a large folder finds is kept for the others.

    Raises:
        DataError: no images.
    """
    found: list[Source] = []
    processes.on_main(lambda: found.append(opened()))
    return found[0] if found else opened()
