"""The classification objective on the engine: data, model, optimiser and loss of a run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from mae_transfer.checkpoint import describe
from mae_transfer.classification.augment import check_micro_batch, finish_batch
from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.features import CachedFeatures, encode
from mae_transfer.classification.images import LabelledBatch, LabelledImages
from mae_transfer.classification.labels import class_numbers, read_class_map
from mae_transfer.classification.model import Classifier, load_encoder
from mae_transfer.classification.setting import Setting
from mae_transfer.data.batches import KeyedBatches, cached
from mae_transfer.data.find import open_source
from mae_transfer.data.share import choose_share
from mae_transfer.data.source import Source, Subset
from mae_transfer.engine.checkpoints import TrainingState
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.objective import Objective, open_once
from mae_transfer.engine.optimizer import build_optimizer
from mae_transfer.engine.parallel import is_sharded
from mae_transfer.engine.run_folder import RunFolder, git_commit
from mae_transfer.engine.trainer import Trainer
from mae_transfer.engine.work import encoder_training_flops
from mae_transfer.errors import ConfigError
from mae_transfer.layer_decay import parameter_groups

logger = logging.getLogger(__name__)


class ClassificationRun(Objective[LabelledBatch]):
    """Everything of a classification run but its folder and its loop.

    Attributes:
        config: resolved.
        source, labels: the training images after ``data.fraction``, and their classes (N,).
        val_source, val_labels: the validation images, labels numbered as the training images'.
        classes: names by number.
        average: of the weights, once there is a trainer that keeps one.

    Raises:
        DataError: no images. ConfigError: no labels, classes that only the validation images have, numbers that do not
            fit together. CheckpointError: an encoder that does not fit.
    """

    model: Classifier
    average: WeightAverage | None = None

    def __init__(self, config: ClassificationConfig, processes: Processes, *, before: RunFolder | None = None) -> None:
        self.given = config
        self.config = config.resolved() if before is None else config.resolved_as(before.config)
        self.goes_on = before is not None
        self.takes_steps = config.protocol != "knn"
        data = self.config.data
        train = open_once(lambda: self._open(data.train_roots, "data.train"), processes)
        val = open_once(lambda: self._open(data.val_roots, "data.val"), processes)
        labels = train.labels
        if labels is None:
            raise ConfigError(
                "data.train has no labels; give a folder of images for each class, or shards or tables that hold labels"
            )
        self.classes = train.classes or [str(number) for number in range(int(labels.max()) + 1)]
        self.val_labels = class_numbers(
            val,
            train.classes,
            num_classes=len(self.classes),
            renamed=read_class_map(data.class_map),
            key="data.val",
        )
        chosen = choose_by_class(train, labels, data.fraction, seed=data.fraction_seed)
        self.labels = labels[chosen]
        self.val_source = cached(val, data)
        source = cached(train if len(chosen) == len(train) else Subset(train, chosen), data)
        super().__init__(self.config, processes, source=source, optim=self.config.optimizer)
        if self.takes_steps:
            self._check_batch()
        self.model = self._build_model().to(processes.device)
        self.sample_flops = encoder_training_flops(self.model, frozen_blocks=self.model.frozen_blocks)

    def _check_batch(self) -> None:
        """Raises ConfigError where a micro-batch is too small, or not to be mixed."""
        train, micro_batch = self.config.train, self.step_sampler(0).micro_batch_size
        check_micro_batch(self.config.augmentation, micro_batch)
        if self.config.protocol == "linear" and micro_batch * self.processes.world_size < 2:
            raise ConfigError(
                f"train.batch_size={train.batch_size} with train.accumulate={train.accumulate} leaves "
                "one image at a time, which has no batch statistics; a linear probe needs two or more"
            )

    def _open(self, roots: Sequence[Path], key: str) -> Source:
        """Labelled images of a run; float values are taken as they are where their statistics were given."""
        data = self.given.data
        floats, cache = data.own_statistics, data.scan_cache_folder
        return open_source(roots, channels=data.channels, floats=floats, cache=cache, key=key)

    def _build_model(self) -> Classifier:
        """The classifier, weights drawn from ``run.seed``, its encoder from the checkpoint, its frozen part frozen. A
        run that goes on has weights of its own, which are put in their place later."""
        config = self.config
        assert config.model.pool is not None
        torch.manual_seed(config.run.seed)
        model = Classifier(
            num_classes=len(self.classes),
            pool=config.model.pool,
            probe=not config.trains_encoder,
            pooled_norm=bool(config.model.pooled_norm),
            **config.encoder_arguments,
        )
        if config.init_checkpoint is not None and not self.goes_on:
            logger.info("%s", load_encoder(model, config.init_checkpoint))
        if config.protocol != "finetune":
            model.train_last(config.layers)
        return model

    def go_on_from(self, state: TrainingState) -> None:
        super().go_on_from(state)
        before = json.loads(state.facts.get("metadata", {}).get("classes", "null"))
        if before is not None and before != self.classes:
            raise ConfigError(
                f"data.train no longer has the classes that the run began with: {_difference(before, self.classes)}. "
                "Give the images as they were, or start a new run in another run.dir"
            )
        if self._encodes_once:
            load_encoder(self.model, state.path)

    def trainer(self, folder: RunFolder) -> Trainer[LabelledBatch]:
        # Features that never change are computed here, by a model that is not spread over processes yet.
        self.dataset = self._make_dataset()
        trainer = super().trainer(folder)
        if is_sharded(self.model):
            register_fsdp_forward_method(self.model, "encode")
        self.average = trainer.average
        return trainer

    @property
    def _encodes_once(self) -> bool:
        """Whether a step's features are those of images as they are, by an encoder that never changes."""
        return self.config.protocol == "linear" and self.config.augmentation.kind == "none"

    def _make_dataset(self) -> KeyedBatches[LabelledBatch]:
        if self._encodes_once:
            encoded = encode(Setting.of(self), self.source, "data.train")
            self.sample_flops = 6.0 * self.model.width * self.model.num_classes  # the head alone, there and back
            return CachedFeatures(encoded, self.labels)
        return LabelledImages(self.source, self.labels, config=self.config, seed=self.config.run.seed)

    def count_steps(self) -> int:
        return super().count_steps() if self.takes_steps else 1

    def every(self, epochs: float) -> int:
        """Steps in ``epochs`` epochs; at least as many as train on as many images as ``data.val`` has, where each test
        runs the encoder."""
        steps = super().every(epochs)
        least = -(-len(self.val_source) // self.config.train.batch_size) if self.config.trains_encoder else 1
        if least > steps and least < self.num_steps:
            logger.info(
                "log.evaluate_every_epochs=%g would be every %d steps, and data.val has %d images: tested every %d",
                *(epochs, steps, len(self.val_source), least),
            )
        return max(steps, least)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Learning rates by layer (BEiT; paper, Table 9); 1-D parameters, positions and tokens are not decayed."""
        groups = parameter_groups(
            self.model,
            depth=self.model.depth,
            rate=self.optim.layer_decay,
            lr=self.optim.base_lr,
            weight_decay=self.optim.weight_decay,
        )
        return build_optimizer(groups, self.optim)

    def loss(self, model: nn.Module, batch: LabelledBatch) -> Tensor:
        """Mean cross-entropy of a micro-batch, whose labels are soft where images are mixed."""
        augment = self.config.augmentation
        images, targets = finish_batch(
            batch, config=augment, mean=self.mean, std=self.std, num_classes=len(self.classes)
        )
        logits = model(images).float()
        smoothing = 0.0 if targets.is_floating_point() else augment.smoothing  # mixed labels hold it already
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def metadata(self) -> dict[str, str]:
        """What transfer needs to know of the encoder, and a reader of the head of its classes."""
        info = describe(
            self.model,
            mean=tuple(self.mean),
            std=tuple(self.std),
            git_commit=git_commit(),
            **self.lineage,
        )
        own = {"protocol": self.config.protocol, "pool": str(self.config.model.pool)}
        return {**info.to_metadata(), **own, "classes": json.dumps(self.classes)}


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What two different lists of classes differ in."""
    gone, new = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
    parts = [f"{_some(gone)} lacking"] if gone else []
    parts += [f"{_some(new)} new"] if new else []
    if not parts:
        place = next(i for i, (old, name) in enumerate(zip(before, now, strict=True)) if old != name)
        parts = [f"number {place} was {before[place]}, is {now[place]}"]
    return ", ".join(parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def choose_by_class(source: Source, labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Indices, ascending, of a share of the images of each class, which depends on the files' names and ``seed``: not
    on where the folder lies, nor on whether its path is given whole.

    Raises:
        ConfigError: the fraction is not above 0 and at most 1.
    """
    if fraction == 1:
        return np.arange(len(labels))
    chosen: list[int] = []
    for label in np.unique(labels):
        indices = [int(index) for index in np.flatnonzero(labels == label)]
        names = {os.path.normpath(Path(source.name(index)).absolute()): index for index in indices}
        folder = os.path.commonpath(names)
        short = {os.path.relpath(name, folder): index for name, index in names.items()}
        chosen += [short[name] for name in choose_share(list(short), fraction, seed=seed, key="data.fraction")]
    return np.array(sorted(chosen), np.int64)
