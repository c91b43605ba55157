"""The sections of a classification config that are its own; the engine's are beside what they configure."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mae_transfer.data.settings import ImagesConfig, folders, pair
from mae_transfer.data.share import check_share
from mae_transfer.engine.metrics import LogConfig as EngineLogConfig
from mae_transfer.engine.optimizer import OptimConfig
from mae_transfer.engine.trainer import TrainConfig as EngineTrainConfig
from mae_transfer.errors import ConfigError, nearest, unknown_key
from mae_transfer.sizes import get_size
from mae_transfer.vit import VisionTransformer

# Arguments of the encoder that have no key of their own in ``model``, with their defaults.
ARCHITECTURE = {
    name: parameter.default
    for name, parameter in inspect.signature(VisionTransformer).parameters.items()
    if name not in ("image_size", "patch_size", "in_channels", "width", "depth", "num_heads")
    and name not in ("drop_path", "checkpointing")
}
POOLS = ("mean", "cls")
KINDS = ("recipe", "crop", "none")
ERASE_MODES = ("pixel", "rand", "const")


def check_choice(key: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raises ConfigError where ``value`` is given and none of ``choices``, naming the nearest."""
    if value is not None and value not in choices:
        guess = nearest(value, choices)
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"{key}={value}{hint} Use one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """Labelled images: folders with one folder a class, or shards and tables that hold labels."""

    train: Any = None  # a folder, shards, parquet files or a `datasets` folder; or a list of them
    val: Any = None  # every image of it is tested exactly once
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    eval_crop: float | None = None  # side of the test crop over that of the resized image; 224/256, above 224 px 1
    fraction: float = 1.0  # share of the training images of each class
    fraction_seed: int = 0  # which ones; a smaller share lies within a larger one
    class_map: str | None = None  # JSON file: folder of data.val -> class of data.train, where names differ

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.fraction, "data.fraction")
        if self.eval_crop is not None and not 0 < self.eval_crop <= 1:
            raise ConfigError(f"data.eval_crop={self.eval_crop} must be above 0 and at most 1")

    @property
    def crop_share(self) -> float:
        """``eval_crop`` without null: as the released code tests."""
        return self.eval_crop or (224 / 256 if max(self.size) <= 224 else 1.0)

    @property
    def train_roots(self) -> list[Path]:
        if self.train is None:
            raise ConfigError("data.train is not set; name the folder of training images: data.train=FOLDER")
        return folders(self.train)

    @property
    def val_roots(self) -> list[Path]:
        if self.val is None:
            raise ConfigError("data.val is not set; name the folder of validation images: data.val=FOLDER")
        return folders(self.val)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder, which the checkpoint describes, and what is put on it."""

    size: str | None = None  # null: the checkpoint's; without one, base
    patch_size: Any = None
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    pool: str | None = None  # mean: of the patch tokens; cls. Null: mean in finetune and partial, cls in linear and knn
    # Whether the encoder's norm is one of averaged patches (fc_norm), as fine-tuning leaves it; null: the checkpoint's.
    pooled_norm: bool | None = None
    drop_path: float | None = None  # null: the size's own in finetune and partial, else 0
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    # What else ``VisionTransformer`` takes (layer_scale, num_registers, rope_base …); null: as the checkpoint has it.
    architecture: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.architecture:
            if key not in ARCHITECTURE:
                raise unknown_key(f"model.architecture.{key}", [f"model.architecture.{name}" for name in ARCHITECTURE])
        if self.size is not None and self.size != "custom":
            get_size(self.size)
        if self.patch_size is not None:
            pair(self.patch_size, "model.patch_size")
        for key in ("width", "depth", "num_heads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}={value} must be at least 1")
        check_choice("model.pool", self.pool, POOLS)
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise ConfigError(f"model.drop_path={self.drop_path} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to a training image. ``recipe`` is the paper's (Table 9), ``crop`` a random crop and flip, ``none``
    what validation does."""

    kind: str
    auto: str  # timm's description of a policy, or "none"
    color_jitter: float
    erase: float  # probability of random erasing
    erase_mode: str  # pixel: noise; rand: one random colour; const: the mean
    mixup: float  # α of the Beta distribution; 0 for none
    cutmix: float
    mixup_prob: float  # of mixing a batch at all
    switch_prob: float  # of cutmix where both are on
    smoothing: float  # of the labels
    flip: float  # probability of a horizontal flip

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


_NOTHING = AugmentConfig(
    kind="none",
    auto="none",
    color_jitter=0.0,
    erase=0.0,
    erase_mode="pixel",
    mixup=0.0,
    cutmix=0.0,
    mixup_prob=1.0,
    switch_prob=0.5,
    smoothing=0.0,
    flip=0.0,
)
AUGMENTATIONS = {
    "none": _NOTHING,
    "crop": replace(_NOTHING, kind="crop", flip=0.5),
    "recipe": replace(
        _NOTHING,
        kind="recipe",
        auto="rand-m9-mstd0.5-inc1",
        erase=0.25,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        flip=0.5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class AugmentSection:
    """``augment.*`` as a config has it: ``kind`` gives values, and what is not null replaces them."""

    kind: str | None = None  # null: recipe in finetune and partial, crop in linear
    auto: str | None = None  # "none" for none
    color_jitter: float | None = None
    erase: float | None = None
    erase_mode: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    mixup_prob: float | None = None
    switch_prob: float | None = None
    smoothing: float | None = None
    flip: float | None = None

    def __post_init__(self) -> None:
        check_choice("augment.kind", self.kind, KINDS)
        check_choice("augment.erase_mode", self.erase_mode, ERASE_MODES)
        for key in ("erase", "mixup_prob", "switch_prob", "flip", "smoothing"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"augment.{key}={value} must lie between 0 and 1")
        for key in ("mixup", "cutmix", "color_jitter"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ConfigError(f"augment.{key}={value} must not be negative; 0 turns it off")
        if self.kind == "none":
            given = [
                part.name
                for part in dataclasses.fields(AugmentConfig)
                if getattr(self, part.name) not in (None, getattr(_NOTHING, part.name))
            ]
            if given:
                raise ConfigError(
                    f"augment.kind=none trains on images as they are tested, and augment.{given[0]}="
                    f"{getattr(self, given[0])} changes them; use augment.kind=crop, which it is added to"
                )

    def concrete(self) -> AugmentConfig:
        """Without nulls; ``kind`` must be given."""
        assert self.kind is not None
        given = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return replace(AUGMENTATIONS[self.kind], **given)


@dataclass(frozen=True, kw_only=True)
class PartialConfig:
    """Partial fine-tuning (paper, Section 4.3)."""

    blocks: float | None = None  # the last so many train, with all behind them; half a block is its MLP. Null: 1

    def __post_init__(self) -> None:
        if self.blocks is not None and (self.blocks < 0 or self.blocks * 2 != int(self.blocks * 2)):
            raise ConfigError(f"partial.blocks={self.blocks}: expected 0, 0.5, 1, 1.5 … (half a block is its MLP)")


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Weighted k-nearest neighbours (Wu et al. 2018, Section 3.4)."""

    k: list[int] = field(default_factory=lambda: [10, 20, 100])
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"knn.k={self.k}: expected one or several numbers of neighbours, such as [10, 20]")
        if self.temperature <= 0:
            raise ConfigError(f"knn.temperature={self.temperature} must be positive")


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """``optim.*`` as a config has it; what is null is the protocol's (see ``RECIPES``)."""

    name: str | None = None  # adamw or lars
    base_lr: float | None = None  # for 256 images
    weight_decay: float | None = None
    betas: list[float] | None = None  # of AdamW
    momentum: float | None = None  # of LARS
    warmup_epochs: float | None = None
    min_lr: float | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None  # largest gradient norm; null for none, as in the paper

    def concrete(self, recipe: OptimConfig) -> OptimConfig:
        """``recipe`` with what is given in its place."""
        return replace(recipe, **{key: value for key, value in dataclasses.asdict(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineTrainConfig):
    """As in pretraining; the length is the recipe's where neither ``epochs`` nor ``steps`` is given."""

    batch_size: int = 1024  # global: over all processes and accumulation rounds


@dataclass(frozen=True, kw_only=True)
class LogConfig(EngineLogConfig):
    """What is recorded along the way, and how often."""

    # Accuracy on data.val; 0: at the end only. However short an epoch is, not before as many images were trained on as
    # data.val has, so that testing takes less time than training; a linear probe is tested as often as this says.
    evaluate_every_epochs: float = 1.0


# What a protocol does not do, and the keys that would say how; a section's name stands for all of it.
_UNUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("trains everything and asks no neighbours", ("partial", "knn")),
    "partial": ("asks no neighbours", ("knn",)),
    "linear": (
        "trains a head on an encoder that stays as it is",
        ("partial", "knn", "model.drop_path", "optim.layer_decay"),
    ),
    "knn": (
        "trains nothing",
        ("partial", "augment", "optim", "model.drop_path", "data.crop_scale", "data.repeats")
        + ("train.epochs", "train.steps", "train.ema"),
    ),
}


def check_used(protocol: str, optimizer: str, sections: Mapping[str, Any], *, recipe: OptimConfig) -> None:
    """Raises ConfigError for keys that ``protocol``, or its ``optimizer``, would not look at: they stand at their
    defaults, or at what a resolved config has for them.

    Args:
        sections: of the config, by name.
        recipe: the protocol's optimiser.
    """
    why, unused = _UNUSED[protocol]
    implied = {"model.drop_path": 0.0, "optim.layer_decay": 1.0}
    implied |= {f"augment.{key}": value for key, value in dataclasses.asdict(_NOTHING).items()}
    wrong = _given(unused, sections, implied)
    if not wrong and protocol != "knn":
        key = "optim.betas" if optimizer == "lars" else "optim.momentum"
        why = f"trains with {optimizer}, which has no {key.removeprefix('optim.')}"
        wrong = _given([key], sections, {"optim.betas": recipe.betas, "optim.momentum": recipe.momentum})
    if not wrong:
        return
    given = ", ".join(f"{key}={_spelt(value)}" for key, (value, _) in wrong.items())
    whole = {key.split(".")[0] for key in wrong} & set(unused)  # sections without any key that is looked at
    undo = [f"{section}=null" for section in sorted(whole)]
    undo += [f"{key}={_spelt(default)}" for key, (_, default) in wrong.items() if key.split(".")[0] not in whole]
    raise ConfigError(
        f"protocol={protocol} {why}, and would not look at {given}; leave that out of the config file, or say on the "
        f"command line: {' '.join(undo)}"
    )


def _given(keys: Sequence[str], sections: Mapping[str, Any], implied: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Those of ``keys`` that stand at neither their default nor at what is ``implied``: their value and default."""
    found = {}
    for key in keys:
        section, _, leaf = key.partition(".")
        plain = type(sections[section])()
        for name in [leaf] if leaf else [part.name for part in dataclasses.fields(plain)]:
            value, default = getattr(sections[section], name), getattr(plain, name)
            if value not in (default, implied.get(f"{section}.{name}", default)):
                found[f"{section}.{name}"] = (value, default)
    return found


def _spelt(value: Any) -> str:
    """As the command line takes it."""
    return str(value) if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
