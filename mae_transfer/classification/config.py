"""What a classification run is made of; keys are those of the command line (``protocol``, ``data.train`` …).

A key that is null follows from the protocol, the model's size or the checkpoint: ``resolved`` spells all of them out.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mae_transfer.checkpoint import EncoderInfo, read_checkpoint, vit_arguments
from mae_transfer.classification.sections import (
    ARCHITECTURE,
    AugmentConfig,
    AugmentSection,
    DataConfig,
    KnnConfig,
    LogConfig,
    ModelConfig,
    OptimSection,
    PartialConfig,
    TrainConfig,
    check_choice,
    check_used,
)
from mae_transfer.data.settings import check_whole_patches, pair
from mae_transfer.engine.checkpoints import CheckpointConfig
from mae_transfer.engine.config import read_config
from mae_transfer.engine.optimizer import OptimConfig
from mae_transfer.engine.run_folder import RESUME_MODES, RunConfig
from mae_transfer.errors import ConfigError
from mae_transfer.sizes import SIZES, get_size

logger = logging.getLogger(__name__)

PROTOCOLS = ("finetune", "partial", "linear", "knn")
# Paper, Table 9 (fine-tuning) and Table 10 (linear probe). Fine-tuning's layer decay is the size's.
FINETUNE_OPTIM = OptimConfig(base_lr=1e-3, weight_decay=0.05, betas=[0.9, 0.999], warmup_epochs=5, min_lr=1e-6)
LINEAR_OPTIM = OptimConfig(name="lars", base_lr=0.1, weight_decay=0.0, momentum=0.9, warmup_epochs=10)
LINEAR_EPOCHS = 90


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """A classification run."""

    protocol: str = "finetune"
    init_checkpoint: str | None = None  # any supported checkpoint of an encoder; null: random weights
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentSection = field(default_factory=AugmentSection)
    partial: PartialConfig = field(default_factory=PartialConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimSection = field(default_factory=OptimSection)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)
        if self.protocol == "knn" and self.run.resume not in RESUME_MODES:
            raise ConfigError(
                f"run.resume={self.run.resume}: protocol=knn has no training state to go on from; use never, or auto "
                "to do it again in its own folder"
            )
        sections = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        name = self.optim.name or ("lars" if self.protocol == "linear" else "adamw")
        check_used(self.protocol, name, sections, recipe=LINEAR_OPTIM if self.protocol == "linear" else FINETUNE_OPTIM)

    @property
    def trains_encoder(self) -> bool:
        """Whether the protocol changes the encoder, or a part of it."""
        return self.protocol in ("finetune", "partial")

    @property
    def augmentation(self) -> AugmentConfig:
        """``augment.*`` without nulls."""
        default = "none" if self.protocol == "knn" else "recipe" if self.trains_encoder else "crop"
        return replace(self.augment, kind=self.augment.kind or default).concrete()

    @property
    def optimizer(self) -> OptimConfig:
        """``optim.*`` without nulls; of a resolved config, as layer decay is the size's."""
        if self.protocol == "knn":
            return replace(LINEAR_OPTIM, warmup_epochs=0)  # takes no step
        if self.protocol == "linear":
            return self.optim.concrete(LINEAR_OPTIM)
        size = SIZES.get(self.model.size or "base", SIZES["base"])
        return self.optim.concrete(replace(FINETUNE_OPTIM, layer_decay=size.finetune_layer_decay))

    @property
    def layers(self) -> float:
        """How many of the last blocks train; of a resolved config."""
        assert self.model.depth is not None
        if self.protocol == "partial":
            return 1.0 if self.partial.blocks is None else self.partial.blocks
        return float(self.model.depth) if self.protocol == "finetune" else 0.0

    def resolved(self) -> ClassificationConfig:
        """The same run with everything spelt out that the protocol, the size and the checkpoint imply.

        Raises:
            CheckpointError: ``init_checkpoint`` cannot be read. ConfigError: values that do not fit together.
        """
        model = self.model
        numbers = (model.size, model.patch_size, model.width, model.depth, model.num_heads)
        complete = None not in (*numbers, model.pooled_norm)  # of a config that was resolved before
        if self.init_checkpoint is None or (complete and self.data.own_statistics):
            return self.filled(None)
        return self.filled(read_checkpoint(self.init_checkpoint).info)

    def resolved_as(self, before: Path) -> ClassificationConfig:
        """``resolved`` for going on with the run that wrote its config to ``before``: what its ``init_checkpoint``
        implied stands there, and the file itself is not needed. Whether it is the same run is not compared."""
        try:
            began = read_config(ClassificationConfig, before)
        except ConfigError as error:
            logger.warning("what init_checkpoint implies is read from it again: %s", error)
            return self.resolved()
        from_nothing = self.init_checkpoint is None and began.init_checkpoint is None
        if from_nothing or began.data.channels != self.data.channels:
            return self.resolved()
        model, data = self.model, self.data
        implied = ["pooled_norm"]
        if model.size in (None, "custom"):
            implied += ["size", "patch_size", "width", "depth", "num_heads"]
        known = {key: getattr(began.model, key) for key in implied if getattr(model, key) in (None, "custom")}
        model = replace(model, **known, architecture={**began.model.architecture, **model.architecture})
        data = replace(data, mean=data.mean or began.data.mean, std=data.std or began.data.std)
        return replace(self, model=model, data=data).filled(None)

    def filled(self, info: EncoderInfo | None) -> ClassificationConfig:
        """``resolved`` with what the checkpoint says, where there is one."""
        model = _filled_model(self.model, info, trains_encoder=self.trains_encoder)
        mean, std = self.data.normalisation
        if info is not None and info.channels == self.data.channels:
            mean, std = self.data.mean or list(info.mean), self.data.std or list(info.std)
        size = self.data.size
        check_whole_patches(size, pair(model.patch_size, "model.patch_size"))
        partial = self.partial
        if self.protocol == "partial" and partial.blocks is None:
            partial = PartialConfig(blocks=1.0)
        result = replace(
            self,
            data=replace(self.data, image_size=list(size), mean=mean, std=std, eval_crop=self.data.crop_share),
            model=model,
            augment=AugmentSection(**dataclasses.asdict(self.augmentation)),
            partial=partial,
        )
        return result if self.protocol == "knn" else result._with_training()

    def _with_training(self) -> ClassificationConfig:
        """Optimiser and length of a config whose model is known."""
        train, optim = self.train, self.optimizer
        if optim.name == "lars" and train.distributed == "fsdp2":
            raise ConfigError(
                "optim.name=lars and train.distributed=fsdp2 do not go together: LARS needs the norms of whole "
                "weights. Use train.distributed=ddp"
            )
        if train.epochs is None and train.steps is None:
            size = SIZES.get(self.model.size or "base", SIZES["base"])
            epochs = float(size.finetune_epochs if self.trains_encoder else LINEAR_EPOCHS)
            train = replace(train, epochs=epochs)
        return replace(self, train=train, optim=OptimSection(**dataclasses.asdict(optim)))

    @property
    def encoder_arguments(self) -> dict[str, Any]:
        """What ``VisionTransformer`` takes for the encoder of a resolved config."""
        model = self.model
        return {
            "image_size": self.data.size,
            "patch_size": pair(model.patch_size, "model.patch_size"),
            "in_channels": self.data.channels,
            "width": model.width,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "drop_path": model.drop_path,
            "checkpointing": model.checkpointing,
            **model.architecture,
        }


def _filled_model(model: ModelConfig, info: EncoderInfo | None, *, trains_encoder: bool) -> ModelConfig:
    """Numbers that are not given: of the size that is given, of the checkpoint, or of ``base``."""
    if model.size not in (None, "custom") or info is None:
        size = get_size("base" if model.size in (None, "custom") else str(model.size))
        patch, width, depth, num_heads = (size.patch_size, size.patch_size), size.width, size.depth, size.num_heads
        name = model.size or size.name
    else:
        patch, width, depth, num_heads, name = info.patch_size, info.width, info.depth, info.num_heads, info.size
    architecture = {**other_arguments(info), **model.architecture}
    has_norm, has_cls = architecture.get("final_norm", True), architecture.get("cls_token", True)
    pooled_norm = model.pooled_norm
    if pooled_norm is None:
        pooled_norm = info is not None and info.pooled_norm and not has_norm
    pool = model.pool or ("mean" if trains_encoder or pooled_norm or not has_cls else "cls")
    if pool == "cls" and (pooled_norm or not has_cls):
        why = "was fine-tuned on averaged patches and has no norm for its cls token" if has_cls else "has no cls token"
        raise ConfigError(f"model.pool=cls: this encoder {why}; use model.pool=mean")
    drop_path = model.drop_path
    if drop_path is None:
        drop_path = SIZES.get(name, SIZES["base"]).finetune_drop_path if trains_encoder else 0.0
    return replace(
        model,
        size=name,
        patch_size=list(patch if model.patch_size is None else pair(model.patch_size, "model.patch_size")),
        width=model.width or width,
        depth=model.depth or depth,
        num_heads=model.num_heads or num_heads,
        pool=pool,
        pooled_norm=pooled_norm,
        drop_path=drop_path,
        architecture=architecture,
    )


def other_arguments(info: EncoderInfo | None) -> dict[str, Any]:
    """Of what ``VisionTransformer`` takes to hold a checkpoint's encoder, that which is not its default."""
    given = {} if info is None else vit_arguments(info)
    return {
        key: list(given[key]) if isinstance(given[key], tuple) else given[key]
        for key, default in ARCHITECTURE.items()
        if key in given and given[key] != default
    }
