"""The settings of a segmentation run: every number that a user gives, each once.

A config file in ``configs/segmentation`` holds these sections as plain dictionaries (inherited through ``_base_``) and
``--cfg-options`` override them by their dotted names; ``recipe`` then derives MMSegmentation's config from them.
A value of None means "derived": the field's comment says from what.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mae_transfer.data.share import check_share
from mae_transfer.engine.config import valid_keys
from mae_transfer.errors import ConfigError, unknown_key
from mae_transfer.segmentation.masks import KINDS
from mae_transfer.segmentation.names import PUBLISHED


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """A folder in ADE20K's layout, or a published data set, and how images are brought to size."""

    name: str | None = None  # ade20k, cityscapes, voc2012 …: its layout, classes, colours and labels, as published
    root: str | None = None  # None: where MMSegmentation's documentation puts the named one; without a name, ADE20K's
    classes: str | None = None  # .txt (a name a line) or .json (list of names); None: ROOT/classes.txt, else the masks
    reduce_zero_label: bool | None = None  # label 0 is unlabelled, the others count from 0; None: if masks are numbers
    masks: str = "auto"  # index (a number a pixel), colours, binary (black, white); auto: colours if there is a table
    colours: str | None = None  # .txt (R G B name a line), .csv or .json: the colour of each class in colour masks
    mask_size: str = "refuse"  # masks of another size than their image; or resize, by nearest neighbour
    crop_size: int | tuple[int, int] = 512  # training crop and test window, pixels
    resize: tuple[int, int] | None = None  # bound on the (longer, shorter) side; None: (4, 1) x the crop's shorter side
    scale_range: tuple[float, float] = (0.5, 2.0)  # training scales, relative to ``resize``
    train_split: str | None = None  # None: the named data set's, or training
    fraction: float = 1.0  # share of the training images that is trained on
    fraction_seed: int = 0  # draws which; a smaller share lies within a larger one
    val_split: str | None = None  # None: the named data set's, or validation
    workers: int = 4


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """The Vision Transformer under the head."""

    size: str | None = None  # None: as in the checkpoint's metadata
    patch_size: int | None = None  # of random weights, a checkpoint has its own; None: the size's
    resize_patches: bool = False  # bring a checkpoint's projection to patch_size, rather than take over its own
    relative_position: str | None = "bias"  # BEiT's table in every block, zero at the start; None for none
    layer_scale: float | None = 1.0
    drop_path: float | None = None  # None: the size's in BEiT's recipe
    checkpointing: bool = False
    frozen: bool = False  # probing: it is not trained, runs as in evaluation, and no gradient goes through it
    pyramid: str | None = None  # four_tap, simple (of the last block, ViTDet) or none; None: four_tap under UperNet
    pyramid_norm: str | None = None  # bn, syncbn, gn, ln; None: ln in the simple pyramid, the head's norm in the other


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """UPerHead and the auxiliary FCN head, or a head for probing on the last block's map."""

    kind: str = "upernet"  # or fcn (two 3x3 convolutions), linear (a norm and a 1x1 convolution)
    channels: int | None = None  # None: the encoder's width
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    norm: str = "auto"  # auto: SyncBN on several GPUs, BN otherwise; or bn, syncbn, gn
    aux_channels: int = 256
    aux_weight: float | None = None  # 0: no auxiliary head; None: 0.4 under UperNet, which alone has one
    loss: tuple[str, ...] | str = "cross_entropy"  # or dice, or several, such as cross_entropy,dice: their sum
    class_weights: tuple[float, ...] | str = "none"  # of cross entropy; balanced: 1/ln(1.02 + share of the pixels)
    ohem: bool = (
        False  # cross entropy of the hard pixels alone (MMSegmentation's OHEMPixelSampler), auxiliary head aside
    )
    ohem_threshold: float = 0.7  # hard: the labelled class is given a lower probability
    ohem_min_kept: int | None = None  # pixels of an image kept in any case; None: a fifth of the crop


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Optimisation and what is written while it runs."""

    max_iters: int = 160_000
    batch_size: int = 16  # of an iteration, over all processes and accumulation rounds
    accumulate: int = 1  # rounds in which a process computes its share; iterations count optimizer steps all the same
    seed: int = 0
    lr: float = 1e-4
    weight_decay: float = 0.05
    layer_decay: float | None = None  # None: the size's in BEiT's recipe
    weight_decay_groups: str = "clean"  # or "parity": as published, position embeddings and tables decayed
    warmup_iters: int | None = None  # None: 1500, or a tenth of a run shorter than 15 000
    clip_grad: float | None = None  # largest norm of the gradient
    freeze_blocks: int = 0  # the embeddings and so many blocks keep their pretrained weights
    ema: float | None = None  # such as 0.999: validate, and keep as best, an average over the weights of the last steps
    precision: str = "bf16"  # fp32, bf16, fp16 (CUDA only)
    distributed: str = "ddp"  # of several processes; or fsdp2: parameters, gradients and moments in shards
    compile: bool = False  # the encoder's blocks, by torch.compile
    val_interval: int | None = None  # None: a tenth of the run
    checkpoint_interval: int | None = None  # None: val_interval
    keep_checkpoints: int = 3  # at least 2: MMEngine removes the oldest before it writes the next
    log_interval: int = 50


@dataclass(frozen=True, kw_only=True)
class TestSettings:
    """Sliding-window inference and its pictures."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    stride: int | tuple[int, int] | None = None  # None: two thirds of the crop
    window_batch: int = 4  # windows to a forward pass
    tta: bool = False  # average over ``scales`` and flips, as --tta does
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of test-time augmentation, on the resized image
    pictures: int = 8  # overlays written at every validation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All sections of a run."""

    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    test: TestSettings = field(default_factory=TestSettings)
    init_checkpoint: str | None = None  # encoder to start from; None: random weights


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from nested dictionaries, ``{"dataset": {"root": …}, "init_checkpoint": …}``.

    Raises:
        ConfigError: an unknown key (the nearest one is named) or a value of the wrong kind.
    """
    valid = valid_keys(Settings)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        kind = _SECTIONS.get(name)
        if kind is None:
            if name not in valid:
                raise unknown_key(name, valid)
            arguments[name] = _checked(name, value, typing.get_type_hints(Settings)[name])
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; expected its settings as name = value: {_names(kind)}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise unknown_key(f"{name}.{key}", valid)
        arguments[name] = kind(**{key: _checked(f"{name}.{key}", entry, hints[key]) for key, entry in value.items()})
    settings = Settings(**arguments)
    _check_choices(settings)
    return settings


def settings_dict(settings: Settings) -> dict[str, Any]:
    """The inverse of ``read_settings``: nested plain dictionaries."""
    return dataclasses.asdict(settings)


_SECTIONS: dict[str, type] = {
    "dataset": DatasetSettings,
    "encoder": EncoderSettings,
    "head": HeadSettings,
    "train": TrainSettings,
    "test": TestSettings,
}

_CHOICES = {
    "dataset.name": (None, *PUBLISHED),
    "dataset.masks": KINDS,
    "dataset.mask_size": ("refuse", "resize"),
    "encoder.relative_position": (None, "bias"),
    "encoder.pyramid": (None, "four_tap", "simple", "none"),
    "encoder.pyramid_norm": (None, "bn", "syncbn", "gn", "ln"),
    "head.kind": ("upernet", "fcn", "linear"),
    "head.norm": ("auto", "bn", "syncbn", "gn"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.distributed": ("ddp", "fsdp2"),
    "train.weight_decay_groups": ("clean", "parity"),
}

LOSSES = ("cross_entropy", "dice")

_AT_LEAST_ONE = (
    "train.max_iters",
    "train.batch_size",
    "train.accumulate",
    "train.val_interval",
    "train.checkpoint_interval",
    "train.log_interval",
    "test.window_batch",
)


def _check_choices(settings: Settings) -> None:
    def value_of(key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(settings, section), name)

    for key, choices in _CHOICES.items():
        if value_of(key) not in choices:
            raise ConfigError(f"{key} is {value_of(key)!r}; expected one of {', '.join(map(str, choices))}")
    for key in _AT_LEAST_ONE:
        value = value_of(key)
        if value is not None and value < 1:
            raise ConfigError(f"{key} is {value}; expected at least 1")
    check_share(settings.dataset.fraction, "dataset.fraction")
    _check_losses(settings.head)
    _check_training(settings)
    if settings.train.keep_checkpoints < 2:
        raise ConfigError(f"train.keep_checkpoints is {settings.train.keep_checkpoints}; expected at least 2")


def loss_names(head: HeadSettings) -> tuple[str, ...]:
    """head.loss as a list of names."""
    return (head.loss,) if isinstance(head.loss, str) else head.loss


def _check_losses(head: HeadSettings) -> None:
    names = loss_names(head)
    unknown = [name for name in names if name not in LOSSES]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"head.loss is {', '.join(names)}; expected one or more of {', '.join(LOSSES)}, each once")
    weights = head.class_weights
    if isinstance(weights, str) and weights not in ("none", "balanced"):
        raise ConfigError(f"head.class_weights is {weights!r}; expected none, balanced, or a number for each class")
    if not isinstance(weights, str) and (min(weights) < 0 or max(weights) == 0):
        raise ConfigError("head.class_weights are factors: none below 0, and not all 0")
    if (head.ohem or weights != "none") and "cross_entropy" not in names:
        raise ConfigError(f"head.ohem and head.class_weights are for cross entropy; head.loss is {', '.join(names)}")
    if not 0 < head.ohem_threshold <= 1:
        raise ConfigError(f"head.ohem_threshold is {head.ohem_threshold:g}; expected a probability above 0, at most 1")
    if head.ohem_min_kept is not None and head.ohem_min_kept < 2:
        raise ConfigError(f"head.ohem_min_kept is {head.ohem_min_kept}; expected at least 2 pixels")


def _check_training(settings: Settings) -> None:
    train = settings.train
    if train.clip_grad is not None and train.clip_grad <= 0:
        raise ConfigError(f"train.clip_grad is {train.clip_grad:g}; expected a norm above 0, or None for no clipping")
    if train.ema is not None and not 0 < train.ema < 1:
        raise ConfigError(f"train.ema is {train.ema:g}; expected a decay between 0 and 1, such as 0.999, or None")
    if train.freeze_blocks < 0:
        raise ConfigError(f"train.freeze_blocks is {train.freeze_blocks}; expected a number of blocks, 0 for none")
    if train.freeze_blocks and not settings.init_checkpoint:
        raise ConfigError(
            f"train.freeze_blocks={train.freeze_blocks} without init_checkpoint would keep random weights"
        )


def _names(kind: type) -> str:
    return ", ".join(entry.name for entry in dataclasses.fields(kind))


def _checked(key: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or a ConfigError that says what was expected."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        converted = _as(value, option)
        if converted is not _NO:
            return converted
    raise ConfigError(f"{key} is {value!r}; expected {' or '.join(_describe(option) for option in options)}")


_NO = object()


def _as(value: Any, kind: Any) -> Any:
    if kind is type(None):
        return None if value is None or value == "None" else _NO
    if kind is bool:
        return value if isinstance(value, bool) else _NO
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO
    if kind is float:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _NO
    if kind is str:
        return value if isinstance(value, str) else _NO
    items = typing.get_args(kind)  # tuple[int, int] or tuple[int, ...]
    if isinstance(value, str) or not isinstance(value, Iterable):
        return _NO
    entries = list(value)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(entries)
    if len(items) != len(entries) or not entries:
        return _NO
    converted = tuple(_as(entry, item) for entry, item in zip(entries, items, strict=True))
    return _NO if _NO in converted else converted


def _describe(kind: Any) -> str:
    simple = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "None",
    }
    if kind in simple:
        return simple[kind]
    items = typing.get_args(kind)
    if items[-1] is Ellipsis:
        return "a list of names such as a,b" if items[0] is str else "a list of numbers such as 1,2,3"
    return f"{len(items)} numbers such as {','.join('1' for _ in items)}"
