"""Classification configs: what follows from protocol, size and checkpoint; the recipes; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mae_transfer import build_vit
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.model import Classifier
from mae_transfer.engine.config import build_config, read_config, to_dict
from mae_transfer.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"
RECIPES = sorted(path for size in ("base", "large", "huge") for path in CONFIGS.glob(f"{size}_*.yaml"))
WIDTHS = {"base": (768, 12, 12, 16), "large": (1024, 24, 16, 16), "huge": (1280, 32, 16, 14)}
# RECIPES.md: base lr, layer decay, drop path, epochs.
FINETUNE = {
    "base_finetune": (1e-3, 0.75, 0.1, 100),
    "large_finetune": (1e-3, 0.75, 0.1, 50),
    "huge_finetune": (1e-3, 0.75, 0.2, 50),
    "base_finetune_released": (5e-4, 0.65, 0.1, 100),
    "large_finetune_released": (1e-3, 0.75, 0.2, 50),
    "huge_finetune_released": (1e-3, 0.75, 0.3, 50),
}


def read(*overrides: str, path: Path | None = None) -> ClassificationConfig:
    return read_config(ClassificationConfig, path, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_read_and_resolved_once(path: Path) -> None:
    config = read(path=path).resolved()
    assert config.resolved() == config
    assert build_config(ClassificationConfig, to_dict(config)) == config, "what a checkpoint keeps is the same run"
    assert config.run.dir != "runs/run", "recipes do not share a folder"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_build_the_papers_models(path: Path) -> None:
    config = read(path=path).resolved()
    with torch.device("meta"):
        model = Classifier(num_classes=1000, pool=str(config.model.pool), probe=not config.trains_encoder,
                           **config.encoder_arguments)  # fmt: skip
    assert (model.width, model.depth, model.num_heads, model.patch_size[0]) == WIDTHS[path.stem.split("_")[0]]
    assert model.image_size == (224, 224)
    assert model.pool == ("mean" if config.trains_encoder else "cls")
    last, first = model.blocks[-1].drop_path.rate, model.blocks[0].drop_path.rate
    assert (first, last) == (0, config.model.drop_path)
    steps = 1_281_167 * float(config.train.epochs or 1) / config.train.batch_size
    assert steps > config.optimizer.warmup_epochs * 1_281_167 / config.train.batch_size


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_recipes(name: str) -> None:
    config = read(path=CONFIGS / f"{name}.yaml").resolved()
    optim, augment = config.optimizer, config.augmentation
    assert (optim.base_lr, optim.layer_decay, config.model.drop_path, config.train.epochs) == FINETUNE[name]
    assert optim.peak_lr(1024) == pytest.approx(4 * FINETUNE[name][0]) and config.train.batch_size == 1024
    assert (optim.name, optim.weight_decay, optim.betas) == ("adamw", 0.05, [0.9, 0.999])
    assert (optim.warmup_epochs, optim.min_lr, optim.clip_grad) == (5, 1e-6, None)
    assert (augment.auto, augment.smoothing, augment.mixup, augment.cutmix) == ("rand-m9-mstd0.5-inc1", 0.1, 0.8, 1.0)
    assert (augment.erase, augment.erase_mode, augment.color_jitter) == (0.25, "pixel", 0)
    assert config.data.eval_crop == 224 / 256 and config.data.crop_scale == [0.08, 1.0]


@pytest.mark.parametrize("size", WIDTHS)
def test_linear_recipes(size: str) -> None:
    config = read(path=CONFIGS / f"{size}_linear.yaml").resolved()
    optim, augment = config.optimizer, config.augmentation
    assert (optim.name, optim.base_lr, optim.momentum, optim.weight_decay) == ("lars", 0.1, 0.9, 0)
    assert (config.train.batch_size, config.train.epochs, optim.warmup_epochs) == (16384, 90, 10)
    assert optim.peak_lr(16384) == pytest.approx(6.4) and optim.layer_decay == 1 and config.model.drop_path == 0
    assert (augment.kind, augment.flip, augment.auto) == ("crop", 0.5, "none")
    assert not augment.mixes and augment.smoothing == augment.erase == 0


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("protocol", ["finetune", "linear", "partial"])
def test_recipes_say_what_follows_anyway(size: str, protocol: str) -> None:
    """Nothing in a recipe's file contradicts what protocol and size alone give."""
    written = to_dict(read(path=CONFIGS / f"{size}_{protocol}.yaml").resolved())
    overrides = [f"protocol={protocol}", f"model.size={size}", f"train.batch_size={written['train']['batch_size']}"]
    implied = to_dict(read(*overrides).resolved())
    for section in ("augment", "optim", "model", "train", "partial"):
        assert written[section] == implied[section], section


def test_numbers_that_are_given_win(tmp_path: Path) -> None:
    config = read("augment.kind=crop", "augment.mixup=0.2", "model.drop_path=0.4", "optim.layer_decay=0.9").resolved()
    assert config.augmentation.mixup == 0.2 and config.augmentation.cutmix == 0 and config.augmentation.mixes
    assert config.model.drop_path == 0.4 and config.optimizer.layer_decay == 0.9
    assert read("train.steps=7").resolved().train.epochs is None, "one of two ways to say how long"
    assert read("data.image_size=448").resolved().data.eval_crop == 1.0


def test_architecture_and_normalisation_are_the_checkpoints(tmp_path: Path) -> None:
    vit = build_vit(size="tiny", width=32, depth=3, num_heads=2, patch_size=4, image_size=16)
    info = describe(vit, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    write_safetensors(tmp_path / "encoder.safetensors", vit.state_dict(), info.to_metadata())
    config = read(f"init_checkpoint={tmp_path}", "data.image_size=32").resolved()
    model = config.model
    assert (model.size, model.width, model.depth, model.num_heads, model.patch_size) == ("custom", 32, 3, 2, [4, 4])
    assert config.data.normalisation == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert config.train.epochs == 100 and config.optimizer.layer_decay == 0.75, "base's where a size has no name"
    own = read(f"init_checkpoint={tmp_path}", "data.image_size=32", "data.mean=[0,0,0]").resolved()
    assert own.data.normalisation == ([0, 0, 0], [0.4, 0.5, 0.6])
    (tmp_path / "encoder.safetensors").unlink()
    assert config.resolved() == config, "nothing is left to look up"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epoch=3"], r"unknown key train\.epoch; did you mean train\.epochs\?"),
        (["protocol=lineal"], r"protocol=lineal; did you mean linear\?"),
        (["model.pool=max"], r"model\.pool=max.* Use one of mean, cls"),
        (["partial.blocks=2"], r"protocol=finetune .* would not look at partial\.blocks=2\.0; .*: partial=null$"),
        (["protocol=partial", "partial.blocks=0.3"], r"expected 0, 0\.5, 1"),
        (["augment.kind=none", "augment.mixup=0.8"], r"augment\.kind=none .* augment\.mixup=0\.8 changes them"),
        (["augment.erase=1.5"], r"augment\.erase=1\.5 must lie between 0 and 1"),
        (["protocol=knn", "optim.base_lr=1"], r"protocol=knn trains nothing, .* optim\.base_lr=1\.0; .*: optim=null$"),
        (["protocol=knn", "augment.kind=recipe", "train.epochs=3"], r"augment=null train\.epochs=null$"),
        (["protocol=knn", "train.steps=3"], r"would not look at train\.steps=3;"),
        (["protocol=knn", "train.ema=0.9"], r"would not look at train\.ema=0\.9;"),
        (["protocol=knn", "model.drop_path=0.1"], r"would not look at model\.drop_path=0\.1;"),
        (
            ["protocol=knn", "data.crop_scale=[0.5,1]"],
            r"data\.crop_scale=\[0\.5,1\.0\]; .*: data\.crop_scale=\[0\.08,1\.0\]$",
        ),
        (
            ["protocol=linear", "optim.layer_decay=0.9", "model.drop_path=0.1"],
            r"model\.drop_path=null optim\.layer_decay=null$",
        ),
        (["protocol=linear", "optim.betas=[0.9,0.99]"], r"lars, which has no betas, .* optim\.betas=\[0\.9,0\.99\];"),
        (["protocol=linear", "knn.k=[3]"], r"would not look at knn\.k=\[3\]; .*: knn=null$"),
        (["optim.momentum=0.5"], r"adamw, which has no momentum"),
        (["knn.temperature=1"], r"protocol=finetune .* would not look at knn\.temperature=1\.0;"),
        (["protocol=partial", "knn.k=[3]"], r"protocol=partial .* would not look at knn\.k=\[3\];"),
        (["protocol=knn", "knn.k=[0]"], r"knn\.k=\[0\]"),
        (["data.fraction=0"], r"data\.fraction=0"),
        (["optim.layer_decay=1.2"], r"optim\.layer_decay=1\.2 must be above 0 and at most 1"),
        (["optim.name=sgd"], r"optim\.name=sgd; use one of adamw, lars"),
        (["protocol=linear", "train.distributed=fsdp2"], r"lars and train\.distributed=fsdp2 do not go together"),
        (["data.image_size=100"], r"nearest: \[96, 96\]"),
        (["model.size=bass"], r"did you mean base\?"),
        (["train.epochs=2", "train.steps=3"], r"both given"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(*overrides).resolved()


@pytest.mark.parametrize(
    ("protocol", "more"),
    [
        ("linear", ["optim.betas=null", "model.drop_path=null", "optim.layer_decay=null", "optim.name=lars"]),
        ("linear", ["model.drop_path=0", "optim=null"]),
        ("knn", ["optim=null", "augment=null", "train.epochs=null", "model.drop_path=null"]),
        ("knn", ["optim=null", "augment.kind=none", "train.epochs=null", "model.drop_path=0", "partial.blocks=null"]),
        ("finetune", ["knn.k=[10,20,100]", "knn.temperature=0.07"]),
    ],
)
def test_what_a_message_says_can_be_done(protocol: str, more: list[str]) -> None:
    """Another protocol with the file of a fine-tuning; keys may be set to their defaults."""
    path = CONFIGS / "base_finetune.yaml"
    if protocol != "finetune":
        with pytest.raises(ConfigError, match=f"protocol={protocol} .* would not look at "):
            read(f"protocol={protocol}", path=path)
    config = read(f"protocol={protocol}", *more, path=path)
    assert config.protocol == protocol and config.resolved().resolved() == config.resolved()


def test_other_optimizers_than_the_protocols() -> None:
    assert read("protocol=linear", "optim.name=adamw", "optim.betas=[0.8,0.9]").resolved().optimizer.betas == [0.8, 0.9]
    assert read("optim.name=lars", "optim.momentum=0.5").resolved().optimizer.momentum == 0.5


def test_a_section_is_frozen_and_takes_keywords_only() -> None:
    config: Any = read()
    with pytest.raises(AttributeError):
        config.protocol = "linear"
    with pytest.raises(TypeError):
        ClassificationConfig("linear")  # type: ignore[misc]


def test_sizes_and_statistics_given_by_hand_leave_the_rest_to_the_checkpoint(tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=32, patch_size=8, layer_scale=1.0, final_norm=False)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit).to_metadata())
    given = ["data.train=a", "data.val=b", f"init_checkpoint={path}", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
    given += ["model.size=tiny", "model.patch_size=8", "model.width=192", "model.depth=12", "model.num_heads=3"]
    config = read_config(ClassificationConfig, None, given).resolved()
    assert config.model.architecture == {"layer_scale": 1.0, "final_norm": False}
    path.unlink()
    assert config.resolved() == config, "which needs no file any more"
