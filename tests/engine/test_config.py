from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mae_transfer.engine.config import read_config, to_yaml, valid_keys
from mae_transfer.engine.optimizer import OptimConfig
from mae_transfer.engine.trainer import TrainConfig
from mae_transfer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Example:
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_over_defaults_and_command_line_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  epochs: 3\n  batch_size: 64\noptim:\n  betas: [0.9, 0.99]\n")
    config = read_config(Example, path, ["train.batch_size=32", "optim.base_lr=1e-3"])
    assert (config.train.epochs, config.train.batch_size, config.train.accumulate) == (3.0, 32, 1)
    assert (config.optim.betas, config.optim.base_lr) == ([0.9, 0.99], 1e-3)


@pytest.mark.parametrize(
    ("overrides", "weight_decay", "base_lr"),
    [
        (["optim=null"], 0.05, 1.5e-4),
        (["optim=null", "optim.base_lr=2"], 0.05, 2.0),
        (["optim.base_lr=2", "optim=null"], 0.05, 1.5e-4),  # the last word
        (["optim.base_lr=2"], 0.5, 2.0),
    ],
)
def test_a_section_of_the_file_is_dropped(
    overrides: list[str], weight_decay: float, base_lr: float, tmp_path: Path
) -> None:
    path = write(tmp_path, "train:\n  epochs: 3\noptim:\n  base_lr: 1\n  weight_decay: 0.5\n")
    config = read_config(Example, path, overrides)
    assert (config.optim.weight_decay, config.optim.base_lr, config.train.epochs) == (weight_decay, base_lr, 3.0)


def test_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = read_config(Example, None, ["train.steps=7", "optim.clip_grad=1"])
    assert read_config(Example, write(tmp_path, to_yaml(config))) == config


def test_valid_keys_are_the_command_lines() -> None:
    assert {"train.epochs", "train.max_skipped", "optim.base_lr"} <= set(valid_keys(Example))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown key train\.epoch; did you mean train\.epochs\?"),
        ("epochs=3", r"unknown key epochs; did you mean train\.epochs\?"),
        ("optimizer.base_lr=3", r"unknown key optimizer\.base_lr; did you mean optim\.base_lr\?"),
        ("train.batch_size=many", r"train\.batch_size: Value 'many'"),
        ("train.batch_size=1.5", r"train\.batch_size: Value '1\.5'"),
        ("train.batch_size=0", "must be at least 1"),
        ("train.batch_size=null", r"train\.batch_size: "),
        ("train=3", "train is a section"),
        ("train.epochs", "section.key=value"),
        ("--train.epochs=3", "section.key=value"),
        ("train.precision=fp64", "fp32, bf16, fp16"),
        ("train.distributed=fsdp", "use one of ddp, fsdp2"),
        ("train.epochs=-1", "must be positive"),
        ("optim.betas=[0.9]", "two numbers"),
        ("optim.betas=0.9", r"optim\.betas: "),
        ("optim.base_lr=0", "must be positive"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(Example, None, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epoch: 3\n", "did you mean train.epochs"),
        ("train:\n", "section train is empty"),
        ("- 3\n", "must hold a mapping"),
        ("train: [\n", "not valid YAML"),
        ("train:\n  epochs: 3\n  steps: 3\n", "train.epochs and train.steps are both given"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(Example, write(tmp_path, text))
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(Example, tmp_path / "absent.yaml")


def test_epochs_and_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both given on the command line"):
        read_config(Example, None, ["train.epochs=3", "train.steps=4"])
    # A length on the command line takes the place of the file's.
    config = read_config(Example, write(tmp_path, "train:\n  epochs: 3\n"), ["train.steps=4"])
    assert (config.train.epochs, config.train.steps) == (None, 4)
