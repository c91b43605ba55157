from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mae_transfer.engine.config import read_config, to_yaml, valid_keys
from mae_transfer.errors import ConfigError
from pretrain.config import PretrainConfig
from pretrain.objective import build_model

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
# Parameters with decoder, in millions (paper's models).
PARAMETERS = {"base": 111.91, "large": 329.54, "huge": 657.07}
# The command line as contracted.
KEYS = {
    "data": "path image_size channels mean std workers",
    "model": "size patch_size decoder_depth decoder_dim norm_pix_loss",
    "mask": "kind ratio",
    "train": "epochs steps batch_size accumulate precision distributed compile max_skipped",
    "optim": "base_lr weight_decay warmup_epochs",
    "checkpoint": "every_steps keep",
    "log": "every_steps",
    "run": "dir seed resume overwrite",
}


def read(*overrides: str, path: Path | None = None) -> PretrainConfig:
    return read_config(PretrainConfig, path, overrides)


def test_the_contracted_keys_exist() -> None:
    wanted = {f"{section}.{leaf}" for section, leaves in KEYS.items() for leaf in leaves.split()}
    assert wanted <= set(valid_keys(PretrainConfig))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path: Path) -> None:
    config = read(path=path)
    with torch.device("meta"):
        model = build_model(config)
    assert model.grid == config.grid
    name = path.stem.split("_")[0]
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)
        assert (config.optim.peak_lr(config.train.batch_size), config.train.batch_size) == (pytest.approx(2.4e-3), 4096)
        assert f"{config.train.epochs:.0f}ep" == path.stem.split("_")[1]


def test_the_papers_recipes_are_all_there() -> None:
    wanted = {f"{size}_{epochs}ep" for size in PARAMETERS for epochs in (800, 1600)} | {"tiny"}
    assert wanted <= {path.stem for path in CONFIGS}


def test_resolved_spells_out_what_is_implied_and_is_idempotent(tmp_path: Path) -> None:
    config = read("model.size=huge", "data.channels=1").resolved()
    assert (config.model.patch_size, config.model.width, config.model.decoder_num_heads) == ([14, 14], 1280, 16)
    assert config.data.mean == [pytest.approx(0.4589, abs=1e-3)]
    assert config.resolved() == config
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read(path=tmp_path / "config.yaml") == config


def test_sizes_and_folders_can_be_lists() -> None:
    config = read("data.image_size=[32, 48]", "model.patch_size=[8, 16]", "data.path=[a, b/c]")
    assert (config.data.size, config.model.patch, config.grid) == ((32, 48), (8, 16), (4, 3))
    assert config.data.roots == [Path("a"), Path("b/c")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.image_size=100"], r"not a whole number of patches of 16x16; nearest: \[96, 96\]"),
        (["data.image_size=big"], r"data\.image_size=big"),
        (["data.image_size=[1,2,3]"], r"data\.image_size="),
        (["model.size=gigantic"], "unknown size"),
        (["mask.kind=rnadom"], "did you mean random"),
        (["mask.ratio=1"], "mask ratio 1"),
        (["mask.kind=grid", "mask.ratio=0.6"], "nearest possible: 0.75"),
        (["data.mean=[0.5]"], "data.mean has 1 values"),
        (["data.std=[0,1,1]"], "must be positive"),
        (["data.channels=4"], "data.channels=4"),
        (["data.cache=disk"], "none or ram"),
        (["data.crop_scale=[0,1]"], "crop_scale"),
        (["model.decoder_depth=0"], "at least 1"),
        (["run.seed=-1"], "must not be negative"),
        (["checkpoint.keep=0"], "at least 1"),
        (["log.every_steps=0"], "at least 1"),
        (["train.epoch=3"], r"unknown key train\.epoch; did you mean train\.epochs\?"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(*overrides)


def test_no_folder_given() -> None:
    with pytest.raises(ConfigError, match=r"data\.path=FOLDER"):
        _ = read().data.roots
