"""From a LazyConfig file and ``key=value`` overrides to a config in which every number that follows is filled in.

LazyConfig creates keys that are mistyped; here a key exists when the file has it, or when it is an argument of what the
file calls. What follows from the data or the checkpoint is filled in before anything is built.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import LazyConfig
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae_transfer.checkpoint import IMAGENET_MEAN, IMAGENET_STD, host_conflict, read_checkpoint, weights_arguments
from mae_transfer.detection.augment import Augmentation
from mae_transfer.detection.dataset import Category, read_categories
from mae_transfer.detection.names import find_dataset
from mae_transfer.detection.settings import check_settings, one_length, settle_length
from mae_transfer.engine.files import write_text
from mae_transfer.errors import ConfigError, unknown_key
from mae_transfer.sizes import get_size

SECTIONS = ("dataset", "train", "optimizer", "schedule", "model")
# Arguments of the called functions that follow from something else, and from what.
DERIVED = {
    "model.num_classes": "the categories of dataset.train.json",
    "model.image_size": "dataset.image_size",
    "model.square_size": "dataset.image_size and dataset.resize",
    "model.pixel_mean": "train.init_checkpoint, or dataset.mean",
    "model.pixel_std": "train.init_checkpoint, or dataset.std",
    "optimizer.model": "the model section",
    "optimizer.batch_size": "train.batch_size",
    "schedule.max_iter": "train.max_iter, or train.epochs and the number of images",
}
_DATA_KEYS = ("name", "json", "images")  # that say where a part's data are
_OUR_CODE = "mae_transfer.detection."


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a LazyConfig ``.py`` (or the ``config.yaml`` of a run) and apply overrides.

    Raises:
        ConfigError: no such file, a file that does not run, a section that is missing, a key that does not exist
            (naming the nearest that does), a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    cfg = _read_yaml(path) if path.suffix in (".yaml", ".yml") else _read_python(path)
    if absent := [section for section in SECTIONS if section not in cfg]:
        raise ConfigError(f"config file {path} has no {' and no '.join(absent)}; see configs/detection/common/base.py")
    for override in overrides:
        _apply(cfg, override)
    one_length(cfg, [override.partition("=")[0] for override in overrides])
    return cfg


def _read_python(path: Path) -> DictConfig:
    if path.suffix != ".py":
        raise ConfigError(f"config file {path} is neither .py (LazyConfig) nor the config.yaml of a run")
    try:
        cfg = LazyConfig.load(str(path))
    except (SyntaxError, ImportError, NameError, KeyError) as error:
        raise ConfigError(f"config file {path} does not run: {type(error).__name__}: {error}") from error
    return cfg


def _read_yaml(path: Path) -> DictConfig:
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"config file {path} holds no sections")
    for section in ("model", "optimizer", "schedule"):
        # Names in a file that came from elsewhere are called: only ours may be.
        target = OmegaConf.select(cfg, f"{section}._target_")
        if not str(target).startswith(_OUR_CODE):
            raise ConfigError(f"{path}: {section}._target_ is {target}; a run of this project names {_OUR_CODE}*")
    return cfg


def valid_keys(cfg: DictConfig) -> dict[str, Any]:
    """Every key that can be set, with its present value, or the default of the function it is an argument of."""
    keys: dict[str, Any] = {}
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    _collect(plain, "", keys)
    return {key: value for key, value in keys.items() if key not in DERIVED}


def _collect(node: Mapping[Any, Any], prefix: str, keys: dict[str, Any]) -> None:
    if "_target_" in node:
        target = node["_target_"]
        function = locate(target) if isinstance(target, str) else target
        for name, parameter in inspect.signature(function).parameters.items():
            keys[prefix + name] = None if parameter.default is inspect.Parameter.empty else parameter.default
    for name, value in node.items():
        if name == "_target_":
            continue
        if isinstance(value, Mapping):
            _collect(value, f"{prefix}{name}.", keys)
        else:
            keys[f"{prefix}{name}"] = value


def _apply(cfg: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"cannot read {override!r}; overrides are written section.key=value")
    valid = valid_keys(cfg)
    if key in DERIVED:
        raise ConfigError(f"{key} follows from {DERIVED[key]} and cannot be set by itself")
    if key not in valid:
        if any(name.startswith(key + ".") for name in valid):
            first = next(name for name in valid if name.startswith(key + "."))
            raise ConfigError(f"{key} is a section; set one of its keys, such as {first}=…")
        raise unknown_key(key, valid)
    try:
        value = OmegaConf.select(OmegaConf.from_dotlist([f"value={text}"]), "value")
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the value of {override!r}: {error}") from error
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    OmegaConf.update(cfg, key, _of_type(value, valid[key], key), merge=False)


def _of_type(value: Any, default: Any, key: str) -> Any:
    """``value`` where its type fits that of ``default``; None fits, and where the default is None anything does."""
    if value is None or default is None or (isinstance(default, str) and default.startswith("${")):
        return value
    fits: tuple[type, ...]
    if isinstance(default, bool):
        fits, expected = (bool,), "true or false"
    elif isinstance(default, int):
        fits, expected = (int,), "a whole number"
    elif isinstance(default, float):
        fits, expected = (int, float), "a number"
    elif isinstance(default, str):
        return str(value)
    else:
        fits, expected = (list,), f"a list such as {list(default)}"
    if not isinstance(value, fits) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ConfigError(f"{key}={value}: expected {expected}")
    return value


def resolve(cfg: DictConfig, *, training: bool = True) -> DictConfig:
    """Fill in what follows from the data and the checkpoint; the result is plain and can be saved as it is.

    Raises:
        ConfigError, DataError, CheckpointError: something needed is not given, or cannot be read.
    """
    cfg = copy.deepcopy(cfg)
    OmegaConf.resolve(cfg)
    dataset, train = cfg.dataset, cfg.train
    # The config of a run knows its categories; evaluating it does not need the training data any more. A released
    # detector, evaluated by a config, has those of the validation data.
    if training or not dataset.get("categories"):
        part = "val" if not training and not any(dataset.train.get(key) for key in _DATA_KEYS) else "train"
        _require_pair(dataset, part, needed=True)
        dataset.categories = [asdict(category) for category in read_categories(dataset[part].json)]
    _require_pair(dataset, "val", needed=not training)
    check_settings(cfg)

    settle_model(cfg, num_classes=len(dataset.categories))
    cfg.optimizer.batch_size = train.batch_size
    settle_length(cfg)
    return cfg


def settle_model(cfg: DictConfig, *, num_classes: int) -> None:
    """Fill in what of the model section follows from the data and from train.init_checkpoint, in place.

    Raises:
        ConfigError, CheckpointError: numbers that do not fit together, or a checkpoint that cannot be read.
    """
    dataset, model, augmentation = cfg.dataset, cfg.model, build_augmentation(cfg)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    patch_size, encoder = model.get("patch_size"), model.get("encoder")
    size = get_size(model.get("size", _default(model, "size")))
    if cfg.train.init_checkpoint:
        info = read_checkpoint(cfg.train.init_checkpoint).info
        mean, std = info.mean, info.std
        patch_size = patch_size or info.patch_size[0]
        encoder = weights_arguments(info) if encoder is None else encoder
        attention = {name: model.get(name, _default(model, name)) for name in ("window_size", "relative_position")}
        if problem := host_conflict(info, **attention):
            alternative = "window_size=0 model.relative_position=" + (info.relative_position or "null")
            raise ConfigError(f"{cfg.train.init_checkpoint} {problem}; it runs under model.{alternative}")
    model.patch_size = patch_size or size.patch_size
    model.encoder = encoder or {}
    model.pixel_mean = [255 * value for value in dataset.mean or mean]
    model.pixel_std = [255 * value for value in dataset.std or std]
    model.num_classes = num_classes
    model.image_size = augmentation.image_size
    model.square_size = augmentation.image_size if augmentation.resize == "jitter" else 0
    if model.image_size % model.patch_size:
        raise ConfigError(f"dataset.image_size={model.image_size} is no multiple of the patch size {model.patch_size}")


def build_augmentation(cfg: DictConfig) -> Augmentation:
    dataset = cfg.dataset
    return Augmentation(
        image_size=dataset.image_size,
        resize=dataset.resize,
        scale=tuple(dataset.scale),
        flips=tuple(dataset.flips),
    )


def categories_of(cfg: DictConfig) -> tuple[Category, ...]:
    """The categories that ``resolve`` wrote into the config."""
    return tuple(Category(id=entry.id, name=entry.name) for entry in cfg.dataset.categories)


def save_config(cfg: DictConfig, path: Path) -> None:
    """Write a resolved config as YAML that ``load_config`` reads back."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    write_text(path, yaml.safe_dump(_named(plain), sort_keys=False, default_flow_style=None, allow_unicode=True))


def _named(node: Any) -> Any:
    """Functions by their dotted name, tuples as lists: what plain YAML can hold."""
    if isinstance(node, dict):
        return {key: _named(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_named(value) for value in node]
    return _convert_target_to_string(node) if callable(node) else node


def _default(node: DictConfig, name: str) -> Any:
    target = node["_target_"]
    function = locate(target) if isinstance(target, str) else target
    return inspect.signature(function).parameters[name].default


def _require_pair(dataset: DictConfig, part: str, *, needed: bool) -> None:
    """json and images of a part are given together, or a name in their place, and at all where they are needed."""
    if name := dataset[part].get("name"):
        if dataset[part].json or dataset[part].images:
            raise ConfigError(f"dataset.{part}.name={name} says what json and images are; give it or them, not both")
        json_file, images = find_dataset(name)
        dataset[part].update(json=str(json_file), images=str(images), name=None)
    given = [key for key in ("json", "images") if dataset[part][key]]
    if len(given) == 1 or (needed and not given):
        absent = [key for key in ("json", "images") if key not in given]
        raise ConfigError(
            " and ".join(f"dataset.{part}.{key}" for key in absent)
            + f" not given; name the COCO json and the image folder, such as dataset.{part}.json=instances.json "
            f"dataset.{part}.images=images/, or a known data set, such as dataset.{part}.name=coco_2017_{part}"
        )
