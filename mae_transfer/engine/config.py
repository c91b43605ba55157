"""A run's configuration: a dataclass, a YAML file and dotted overrides, strictly read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mae_transfer.errors import ConfigError, unknown_key

ConfigT = TypeVar("ConfigT")

# Two ways to say one thing. In one place both are the user's contradiction; given on the command line,
# one replaces the other that the file had.
ALTERNATIVES = (("train.epochs", "train.steps"),)


def valid_keys(schema: type) -> list[str]:
    """Every dotted key of a config dataclass, such as ``train.epochs``."""
    keys = []
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        section = types[field.name]
        if dataclasses.is_dataclass(section):
            assert isinstance(section, type)
            keys += [f"{field.name}.{leaf}" for leaf in valid_keys(section)]
        else:
            keys.append(field.name)
    return keys


def mapping_keys(schema: type) -> list[str]:
    """The dotted keys of a config whose values are mappings with keys of their own."""
    keys = []
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            keys += [f"{name}.{leaf}" for leaf in mapping_keys(kind)]
        elif get_origin(kind) is dict:
            keys.append(name)
    return keys


def read_config(schema: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """The config of ``schema`` with a YAML file over its defaults and ``a.b=value`` overrides over both; ``a=null``
    drops what the file says of section ``a``.

    Raises:
        ConfigError: the file is missing or not a mapping; a key that does not exist (naming the nearest that does);
            a value of the wrong type; anything a section's own ``__post_init__`` refuses.
    """
    from_file = _read_yaml(Path(path)) if path is not None else {}
    from_command_line = _parse_overrides(overrides)
    for section in _sections(schema):
        if f"{section}=null" in overrides:
            from_file.pop(section, None)
            if from_command_line[section] is None:  # no key of it follows
                from_command_line.pop(section)
    for given, where in ((from_file, f"in {path}"), (from_command_line, "on the command line")):
        check_keys(given, schema)
        for pair in ALTERNATIVES:
            if all(_get(given, key) is not None for key in pair):
                raise ConfigError(f"{pair[0]} and {pair[1]} are both given {where}; give one of them")
    for pair in ALTERNATIVES:
        for key, other in (pair, pair[::-1]):
            if _get(from_command_line, key) is not None:
                _drop(from_file, other)
    return build_config(schema, from_file, from_command_line)


def build_config(schema: type[ConfigT], *layers: Mapping[str, Any]) -> ConfigT:
    """The frozen dataclass from nested mappings, later ones winning; types are checked and converted."""
    config = _writable(OmegaConf.structured(schema))
    try:
        merged = OmegaConf.merge(config, *[OmegaConf.create(dict(layer)) for layer in layers])
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the config"
        reason = str(getattr(error, "msg", None) or error).split("\n")[0]
        raise ConfigError(f"{key}: {reason}") from error
    assert isinstance(result, schema)
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts, lists and scalars, ready for YAML or a checkpoint."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that ``read_config`` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=False, allow_unicode=True)


def flatten(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_keys(given: Mapping[str, Any], schema: type) -> None:
    """Raises ConfigError for the first key, at any depth, that ``schema`` does not have."""
    valid = valid_keys(schema)
    open_ended = tuple(f"{key}." for key in mapping_keys(schema))
    sections = _sections(schema)
    for key, value in flatten(given).items():
        if key in sections:
            if value is None:  # "data:" with nothing below it
                raise ConfigError(f"section {key} is empty; remove it or give its keys")
            raise ConfigError(f"{key} is a section; set one of its keys, such as {_first(valid, key)}=…")
        if key not in valid and not key.startswith(open_ended):
            raise unknown_key(key, valid)


def _sections(schema: type) -> set[str]:
    return {key.split(".")[0] for key in valid_keys(schema) if "." in key}


def _first(valid: Sequence[str], section: str) -> str:
    return next(key for key in valid if key.startswith(section + "."))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ConfigError(f"config file {path} must hold a mapping of sections, such as 'train:' and 'data:'")
    return given


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"cannot read {override!r}; overrides are written section.key=value")
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the overrides {' '.join(overrides)}: {error}") from error
    assert isinstance(given, dict)
    return {str(key): value for key, value in given.items()}


def _get(given: Mapping[str, Any], key: str) -> Any:
    return flatten(given).get(key)


def _drop(given: dict[str, Any], key: str) -> None:
    section, leaf = key.split(".")
    if isinstance(given.get(section), dict):
        given[section].pop(leaf, None)


def _writable(config: DictConfig) -> DictConfig:
    """OmegaConf makes frozen dataclasses read-only, section by section, which also forbids merging into them."""
    OmegaConf.set_readonly(config, False)
    for key in config:
        if isinstance(config[key], DictConfig):
            OmegaConf.set_readonly(config[key], False)
    return config
