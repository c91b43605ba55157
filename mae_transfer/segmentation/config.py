"""From a config file and ``--cfg-options`` to the config that MMSegmentation's Runner takes.

Settings (``settings.Settings``) are resolved first and the config is derived from them (``recipe``); what a file or an
option says of MMSegmentation's own keys (``model.decode_head.dropout_ratio=0``) is laid over the result. The dumped
config of a run holds both, and can be read again here or by MMSegmentation's tools.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS

from mae_transfer.checkpoint import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZE_ARGUMENTS,
    EncoderInfo,
    host_conflict,
    read_checkpoint,
    weights_arguments,
)
from mae_transfer.engine.config import flatten, valid_keys
from mae_transfer.errors import ConfigError, unknown_key
from mae_transfer.segmentation import recipe
from mae_transfer.segmentation.losses import balanced_weights
from mae_transfer.segmentation.masks import Colour
from mae_transfer.segmentation.recipe import Facts
from mae_transfer.segmentation.settings import Settings, read_settings, settings_dict
from mae_transfer.segmentation.source import class_names, class_palette, splits_of
from mae_transfer.sizes import SIZES, get_size

# Keys of MMEngine's Runner that a file may add to those that the recipe derives.
_RUNNER_KEYS = ("auto_scale_lr", "model_wrapper_cfg", "experiment_name", "compile")
# Settings that the class names depend on.
_CLASS_KEYS = tuple(f"dataset.{key}" for key in ("name", "root", "classes", "reduce_zero_label", "masks", "colours"))
_DUMPED = ("settings", "facts", "overrides")


def load_config(
    path: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    work_dir: str,
    num_processes: int = 1,
    for_training: bool = True,
    amp: bool = False,
) -> Config:
    """The complete config of a run.

    Args:
        path: a config file of settings, or the config that an earlier run dumped.
        options: dotted keys and values that win over the file.
        work_dir: where the run writes.
        num_processes: that share a batch.
        amp: train in bf16 where the settings say fp32.
        for_training: read the encoder at ``init_checkpoint``; without, the file is not needed if ``path`` is a dump.

    Raises:
        ConfigError: the file is missing or no config, or a key or value that does not exist.
        DataError: the class list cannot be had.
        CheckpointError: ``init_checkpoint`` cannot be read.
    """
    options = dict(options or {})
    values = _read(path)
    dumped = values if "settings" in values else {}
    sections = {key.split(".")[0] for key in valid_keys(Settings)}
    given = dumped.get("settings") or {key: value for key, value in values.items() if key in sections}
    overrides = dumped.get("overrides", {}) if dumped else {k: v for k, v in values.items() if k not in sections}
    chosen = {key: value for key, value in options.items() if key.split(".")[0] in sections}
    given = _with_options(given, chosen)
    settings = read_settings(given)
    if amp and settings.train.precision == "fp32":
        settings = replace(settings, train=replace(settings.train, precision="bf16"))
    facts = gather_facts(settings, chosen, dumped.get("facts"), num_processes=num_processes, for_training=for_training)
    config = derive(settings, facts, work_dir)
    if for_training and settings.head.class_weights == "balanced":
        config = derive(settings, replace(facts, class_weights=_count_weights(config)), work_dir)
    _lay_over(config, overrides, str(path))
    framework = {key: value for key, value in options.items() if key not in chosen}
    _check_framework_keys(config, framework)
    _lay_over(config, _nested(framework, {}), "--cfg-options")
    config.overrides = _nested(framework, overrides)
    return Config(config.to_dict(), filename=str(path))


def derive(settings: Settings, facts: Facts, work_dir: str) -> Config:
    """MMSegmentation's config from settings and facts alone; nothing is read."""
    return Config(
        {
            "model": recipe.model(settings, facts),
            **recipe.data(settings, facts),
            **recipe.schedule(settings, facts),
            **recipe.runtime(settings, facts, work_dir),
            "settings": settings_dict(settings),
            "facts": {
                "size": facts.size,
                "patch_size": facts.patch_size,
                "encoder": dict(facts.encoder),
                "mean": facts.mean,
                "std": facts.std,
                "classes": facts.classes,
                "palette": facts.palette,
                "class_weights": facts.class_weights,
            },
            "overrides": {},
        }
    )


def _count_weights(config: Config) -> tuple[float, ...]:
    """Class weights from the pixels of the training masks."""
    with DefaultScope.overwrite_default_scope("mmseg"):
        return balanced_weights(DATASETS.build(config.train_dataloader.dataset).label_counts())


def gather_facts(
    settings: Settings,
    chosen: Mapping[str, Any],
    known: Mapping[str, Any] | None,
    *,
    num_processes: int,
    for_training: bool,
) -> Facts:
    """What the settings refer to: the encoder's metadata and the class names.

    ``known`` are the facts of the run that dumped the config; they hold unless an option changes what they are of,
    so that a finished run can be tested where its encoder file or its data set is no longer.
    """
    encoder_keys = ("init_checkpoint", "encoder.size", "encoder.patch_size")
    info: EncoderInfo | None = None
    if settings.init_checkpoint and (known is None or for_training or any(key in chosen for key in encoder_keys)):
        info = read_checkpoint(settings.init_checkpoint).info
    palette: tuple[Colour, ...]
    if known is not None and not any(key in chosen for key in _CLASS_KEYS):
        classes = tuple(known["classes"])
        palette = tuple((red, green, blue) for red, green, blue in known.get("palette", ()))
    else:
        splits = splits_of(settings.dataset)
        classes = class_names(splits, settings.dataset.classes)
        palette = class_palette(splits[0], classes)
    shared: dict[str, Any] = {
        "classes": classes,
        "palette": palette,
        "num_processes": num_processes,
        "gpus": torch.cuda.is_available(),
    }
    if known is not None and info is None and not any(key in chosen for key in encoder_keys):
        return Facts(
            size=known["size"],
            patch_size=known["patch_size"],
            encoder=known.get("encoder", {}),
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
            **shared,
        )
    size, patch_size = resolve_encoder(settings, info, patch_given="encoder.patch_size" in chosen)
    if info and (problem := host_conflict(info, window_size=0, relative_position=settings.encoder.relative_position)):
        raise ConfigError(
            f"{settings.init_checkpoint} {problem}; it runs under encoder.relative_position={info.relative_position}"
        )
    taken = weights_arguments(info) if info else {}
    if settings.encoder.size:  # that of a named size; loading refuses another
        taken = {name: value for name, value in taken.items() if name not in SIZE_ARGUMENTS}
    return Facts(
        size=size,
        patch_size=patch_size,
        encoder=taken,
        mean=info.mean if info else IMAGENET_MEAN,
        std=info.std if info else IMAGENET_STD,
        **shared,
    )


def resolve_encoder(settings: Settings, info: EncoderInfo | None, *, patch_given: bool = False) -> tuple[str, int]:
    """Size and patch. A size that is set must be the checkpoint's (its loading says so); a patch that a config file
    sets is for random weights, and a checkpoint's own wins over it unless the patch was ``patch_given`` as an option
    or ``encoder.resize_patches`` is set.

    Raises:
        ConfigError: neither says, or the checkpoint is not of a size known here, or has oblong patches.
    """
    encoder = settings.encoder
    if info is not None and info.channels != 3:
        raise ConfigError(f"{settings.init_checkpoint} was trained on {info.channels} channels; segmentation reads RGB")
    size = encoder.size or (info.size if info else None)
    if size is None:
        raise ConfigError(f"encoder.size is not set and there is no init_checkpoint to tell; sizes: {', '.join(SIZES)}")
    if size not in SIZES and (size != "custom" or encoder.size):
        raise ConfigError(f"encoder.size is {size!r}; expected one of {', '.join(SIZES)}")
    patch = encoder.patch_size
    if info is not None and not patch_given and not encoder.resize_patches:
        if info.patch_size[0] != info.patch_size[1]:
            raise ConfigError(
                f"{settings.init_checkpoint} has oblong patches {info.patch_size}; the pyramid needs square ones"
            )
        patch = info.patch_size[0]
    return size, patch or get_size(size).patch_size


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as ``--cfg-options`` reads them: numbers, True, None, lists as ``1,2`` or ``(1,2)``.

    Raises:
        ConfigError: a text without ``=``.
    """
    wrong = next((text for text in texts if "=" not in text), None)
    if wrong is not None:
        raise ConfigError(f"option {wrong!r}: expected key=value, such as dataset.crop_size=512")
    parser = argparse.ArgumentParser()
    parser.add_argument("--options", nargs="*", action=DictAction, default={})
    return parser.parse_args(["--options", *texts]).options


def process_count(launcher: str) -> int:
    """Processes of the launch that this one belongs to, before MMEngine has set it up."""
    if launcher == "none":
        return 1
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1")


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    if path.suffix != ".py":
        raise ConfigError(
            f"config file {path} is not a Python file; expected one like configs/segmentation/upernet_tiny.py"
        )
    try:
        values = Config.fromfile(str(path), import_custom_modules=False).to_dict()
    except (SyntaxError, FileNotFoundError, NameError, KeyError, TypeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {type(error).__name__}: {error}") from error
    known = {key.split(".")[0] for key in valid_keys(Settings)} | set(_DUMPED) | set(_RUNNER_KEYS) | _derived_keys()
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: {unknown_key(key, known)}")
    return values


def _derived_keys() -> set[str]:
    """Top-level keys that the recipe derives, whatever the settings."""
    facts = Facts(size="tiny", patch_size=16, mean=IMAGENET_MEAN, std=IMAGENET_STD, classes=("a", "b"))
    return set(derive(Settings(), facts, "work_dir").keys())


def _with_options(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted options over them; refuses keys that do not exist."""
    valid = valid_keys(Settings)
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    for key, value in chosen.items():
        if key not in valid:
            raise unknown_key(key, valid)
        section, _, name = key.partition(".")
        if name:
            result.setdefault(section, {})[name] = value
        else:
            result[section] = value
    return result


def _lay_over(config: Config, overrides: Mapping[str, Any], source: str) -> None:
    _open_nones(config, overrides)
    try:
        config.merge_from_dict(dict(overrides))
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{source} cannot be laid over the derived config: {error}") from error


def _open_nones(config: Any, overrides: Mapping[str, Any]) -> None:
    """Make room where a dictionary is laid over a None, such as ``optim_wrapper.clip_grad``; MMEngine refuses to."""
    for key, value in overrides.items():
        if not isinstance(value, Mapping) or key not in config:
            continue
        if config[key] is None:
            config[key] = {}
        elif isinstance(config[key], Mapping):
            _open_nones(config[key], value)


def _check_framework_keys(config: Config, options: Mapping[str, Any]) -> None:
    """Refuse options that name nothing in the config, where MMEngine would create it and ignore it."""
    valid: list[str] | None = None
    for key in options:
        node: Any = config
        for part in key.split("."):
            if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, Mapping | Config) and part in node:
                node = node[part]
            elif node is None:  # such as optim_wrapper.clip_grad.max_norm=1: nothing is said of it yet
                break
            else:
                valid = [
                    *valid_keys(Settings),
                    *(name for name in flatten(config.to_dict()) if not name.startswith(_DUMPED)),
                ]
                raise unknown_key(key, valid)


def _nested(options: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted options as nested dictionaries, laid over ``base``."""
    config = Config(dict(base))
    config.merge_from_dict(dict(options), allow_list_keys=False)
    return config.to_dict()
