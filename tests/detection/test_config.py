"""Configs: every one builds, a mistyped key is refused, and what follows from something else does follow."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate

from mae_transfer.checkpoint import encoder_state, write_safetensors
from mae_transfer.checkpoint.load import describe
from mae_transfer.detection.config import load_config, resolve, save_config
from mae_transfer.errors import ConfigError
from mae_transfer.sizes import SIZES
from mae_transfer.vit import build_vit

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"
TINY = CONFIGS / "tiny.py"


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=1, side=48)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_builds(path: Path, scenes: Any) -> None:
    cfg = resolve(load_config(path, scenes.overrides))
    with torch.device("meta"):
        model = instantiate(cfg.model)
        optimizer = instantiate({**cfg.optimizer, "model": model})
    assert model.roi_heads.num_classes == 2
    size = SIZES[cfg.model.size]
    assert model.backbone.net.depth == size.depth
    windowed = [block for block in range(size.depth) if hasattr(model.backbone.net.blocks[block].attn, "window_size")]
    assert windowed == [block for block in range(size.depth) if block not in size.quarter_blocks]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    if path.stem.startswith("tiny"):
        assert "No published number exists" in path.read_text()
    else:
        assert re.search(r"arXiv \d{4}\.\d{5}", path.read_text())
        assert re.search(r"Expected on val2017|No (result|number) is published", path.read_text())
        assert model.backbone.padding_constraints["size_divisibility"] == 1024


@pytest.mark.parametrize(
    ("name", "iterations", "lr", "weight_decay", "layer_decay", "rule", "kind"),
    [
        # ViTDet: 184 375 is printed in its configs, and three quarters of it for H.
        ("mask_rcnn_b_sfp_100ep", 184375, 1e-4, 0.1, 0.7, "parity", "steps"),
        ("mask_rcnn_l_sfp_100ep", 184375, 1e-4, 0.1, 0.8, "parity", "steps"),
        ("mask_rcnn_h_sfp_75ep", 138281, 1e-4, 0.1, 0.9, "all", "steps"),
        ("cascade_mask_rcnn_b_sfp", 184375, 1e-4, 0.1, 0.7, "parity", "steps"),
        ("cascade_mask_rcnn_l_sfp", 184375, 1e-4, 0.1, 0.8, "parity", "steps"),
        ("cascade_mask_rcnn_h_sfp", 138281, 1e-4, 0.1, 0.9, "all", "steps"),
        *(
            (f"mask_rcnn_{size}_fpn_{epochs}ep", epochs * 184375 // 100, 8e-5, 0.1, 1.0, "clean", "cosine")
            for size in "blh"
            for epochs in (25, 50, 100)
        ),
        *((f"mask_rcnn_{size}_fpn_400ep_scratch", 737500, 1.6e-4, 0.2, 1.0, "clean", "cosine") for size in "blh"),
    ],
)
def test_schedules_are_the_published_ones(
    name: str, iterations: int, lr: float, weight_decay: float, layer_decay: float, rule: str, kind: str
) -> None:
    cfg = load_config(CONFIGS / f"{name}.py")
    assert (cfg.train.max_iter, cfg.train.batch_size, cfg.train.clip_norm) == (iterations, 64, None)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (lr, weight_decay)
    assert (cfg.optimizer.layer_decay, cfg.optimizer.decay_rule) == (layer_decay, rule)
    assert list(cfg.optimizer.betas) == [0.9, 0.999]
    assert (cfg.schedule.kind, cfg.schedule.warmup_iters) == (kind, 250 if kind == "steps" else 461)
    assert (cfg.dataset.image_size, cfg.dataset.resize, list(cfg.dataset.scale)) == (1024, "jitter", [0.1, 2.0])


def test_every_config_is_in_the_zoo_table() -> None:
    table = (CONFIGS / "README.md").read_text()
    assert not [path.name for path in CONFIGS.glob("*.py") if f"({path.name})" not in table]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iters=5", "unknown key train.max_iters; did you mean train.max_iter?"),
        ("dataset.train.jsn=x", "did you mean dataset.train.json?"),
        ("model.patchsize=8", "did you mean model.patch_size?"),
        ("optimiser.lr=1", "did you mean optimizer.lr?"),
        ("train=5", "train is a section"),
        ("train.max_iter", "section.key=value"),
        ("train.max_iter=many", "expected a whole number"),
        ("optimizer.lr=high", "expected a number"),
        ("model.anchor_sizes=8", "expected a list"),
        ("model.num_classes=5", "follows from the categories"),
        ("model.image_size=5", "follows from dataset.image_size"),
    ],
)
def test_overrides_that_cannot_be_meant(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [override])
    assert message in str(caught.value)


def test_arguments_the_file_does_not_mention_can_be_set(scenes: Any) -> None:
    cfg = load_config(TINY, ["model.score_threshold=0.2", "optimizer.lr=1e-3", "model.anchor_sizes=[8,16,32,64,128]"])
    assert cfg.model.score_threshold == 0.2
    assert cfg.optimizer.lr == 1e-3
    assert list(cfg.model.anchor_sizes) == [8, 16, 32, 64, 128]


def test_image_size_is_given_once(scenes: Any) -> None:
    cfg = resolve(load_config(CONFIGS / "mask_rcnn_b_sfp_100ep.py", [*scenes.overrides, "dataset.image_size=512"]))
    with torch.device("meta"):
        backbone = instantiate(cfg.model).backbone
    assert backbone.padding_constraints["size_divisibility"] == 512
    assert backbone.net.blocks[2].attn.rel_pos_h.shape[0] == 2 * (512 // 16) - 1
    assert backbone.net.grid == (14, 14)  # ViTDet keeps the pretraining's table


def test_schedule_follows_a_shorter_run(scenes: Any) -> None:
    cfg = resolve(load_config(CONFIGS / "mask_rcnn_b_sfp_100ep.py", [*scenes.overrides, "train.max_iter=900"]))
    factor = instantiate(cfg.schedule)
    assert factor(799 / 900) == pytest.approx(1)
    assert factor(801 / 900) == pytest.approx(0.1)


def test_patch_and_normalisation_come_from_the_checkpoint(scenes: Any, tmp_path: Path) -> None:
    vit = build_vit("tiny", patch_size=8, image_size=64)
    info = describe(vit, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4))
    write_safetensors(tmp_path / "encoder.safetensors", encoder_state(vit.state_dict()), info.to_metadata())
    overrides = [*scenes.overrides, f"train.init_checkpoint={tmp_path / 'encoder.safetensors'}"]
    cfg = resolve(load_config(TINY, overrides))
    assert cfg.model.patch_size == 8
    assert list(cfg.model.pixel_mean) == [127.5, 63.75, 31.875]
    assert list(cfg.model.pixel_std) == pytest.approx([51, 76.5, 102])
    model = instantiate(cfg.model)
    assert model.input_format == "RGB"
    assert model.pixel_mean.flatten().tolist() == [127.5, 63.75, 31.875]


def test_without_a_checkpoint_it_is_imagenets_rgb(scenes: Any) -> None:
    cfg = resolve(load_config(TINY, scenes.overrides))
    assert list(cfg.model.pixel_mean) == pytest.approx([123.675, 116.28, 103.53])
    assert cfg.model.patch_size == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "dataset.train.json and dataset.train.images not given"),
        (["dataset.train.json=x.json"], "dataset.train.images not given"),
        (["dataset.train.json=x.json", "dataset.train.images=x"], "x.json does not exist"),
        (["train.max_iter=0"], "train.max_iter=0"),
        (["model.size=giant"], "unknown size"),
        (["dataset.image_size=100", "model.patch_size=16"], "no multiple of the patch size 16"),
        (["schedule.warmup_iters=5000"], "does not fit"),
        (["train.init_checkpoint=none.pth"], "none.pth"),
        (["dataset.resize=crop"], "jitter, native"),
    ],
)
def test_what_cannot_be_resolved(overrides: list[str], message: str, scenes: Any) -> None:
    names_data = not overrides or overrides[0].startswith("dataset.train")
    given = overrides if names_data else [*scenes.overrides, *overrides]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        resolve(load_config(TINY, given))


def test_validation_json_and_images_belong_together(scenes: Any) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.val\.images not given"):
        resolve(load_config(TINY, [*scenes.overrides, "dataset.val.images=null"]))


def test_a_saved_config_reads_back_as_it_was(scenes: Any, tmp_path: Path) -> None:
    cfg = resolve(load_config(TINY, scenes.overrides))
    save_config(cfg, tmp_path / "config.yaml")
    again = resolve(load_config(tmp_path / "config.yaml"))
    save_config(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert instantiate(again.model).backbone.net.width == 192
    scenes.json.rename(tmp_path / "val.json")  # a run's config evaluates without its training data
    val = f"dataset.val.json={tmp_path / 'val.json'}"
    assert resolve(load_config(tmp_path / "config.yaml", [val]), training=False).model.num_classes == 2


def test_a_saved_config_calls_only_our_code(scenes: Any, tmp_path: Path) -> None:
    save_config(resolve(load_config(TINY, scenes.overrides)), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    changed = re.sub(r"mae_transfer\.detection[a-z.]*\.mask_rcnn", "os.system", text)
    assert changed != text
    (tmp_path / "config.yaml").write_text(changed)
    with pytest.raises(ConfigError, match=r"os\.system"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def", "does not run: SyntaxError"),
        ("from .nowhere import x", "does not run: ImportError"),
        ("x = {}", "has no dataset"),
    ],
)
def test_config_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.py")
