"""Encoders that are no plain ViT as the backbone: the config takes from the file what belongs to its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate

from mae_transfer.attention import WindowAttention
from mae_transfer.checkpoint import describe, load_backbone, write_safetensors
from mae_transfer.checkpoint.detectors import load_initial
from mae_transfer.detection.config import load_config, resolve, save_config
from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.vit import build_vit
from tests.checkpoint.foreign import assert_equal, pictures
from tests.checkpoint.hosted import FOREIGN, SIDE, last_map, last_map_without_cls

TINY = Path(__file__).resolve().parents[2] / "configs" / "detection" / "tiny.py"


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=1, side=48)


@pytest.mark.parametrize("family", ["DeiT III", "DINOv3"])  # timm's BEiT has no attention without a cls token
def test_features_are_those_of_the_familys_own_model(family: str, scenes: Any, tmp_path: Path) -> None:
    foreign = FOREIGN[family]
    path, theirs = foreign.save(tmp_path)
    relative = foreign.relative_position or "null"
    overrides = [
        *scenes.overrides,
        f"train.init_checkpoint={path}",
        f"dataset.image_size={SIDE}",
        "model.window_size=0",
    ]
    overrides += [f"model.relative_position={relative}"]
    cfg = resolve(load_config(TINY, overrides))
    assert dict(cfg.model.encoder) == foreign.encoder
    save_config(cfg, tmp_path / "config.yaml")  # as a run does; it is built from that alone when it is evaluated
    model = instantiate(load_config(tmp_path / "config.yaml").model).eval()
    report = load_backbone(model.backbone.net, path)
    assert not report.missing
    images = pictures(SIDE, SIDE)
    with torch.no_grad():
        (ours,) = model.backbone.net.forward_taps(images, [model.backbone.net.depth - 1])
    if family == "DINOv3":  # registers go with a cls token, so it keeps it
        assert_equal(ours, last_map(theirs, images))
    else:
        assert "cls_token" in report.unexpected
        assert_equal(ours, last_map_without_cls(theirs, images))


def test_what_windows_or_relative_positions_exclude_is_said_with_what_to_set(scenes: Any, tmp_path: Path) -> None:
    for family, setting in (
        ("DINOv3", "model.window_size=0 model.relative_position=null"),
        ("BEiT", "model.window_size=0 model.relative_position=bias"),
    ):
        path, _ = FOREIGN[family].save(tmp_path)
        with pytest.raises(ConfigError, match=setting):
            resolve(load_config(TINY, [*scenes.overrides, f"train.init_checkpoint={path}"]))


def test_an_architecture_that_is_set_wins_and_the_file_must_fit_it(scenes: Any, tmp_path: Path) -> None:
    path, _ = FOREIGN["DeiT III"].save(tmp_path)
    overrides = [*scenes.overrides, f"train.init_checkpoint={path}", "model.encoder={norm_eps: 1e-5}"]
    cfg = resolve(load_config(TINY, overrides))
    assert dict(cfg.model.encoder) == {"norm_eps": 1e-5}
    with pytest.raises(CheckpointError, match=r"no place for blocks\.\*\.ls1\.gamma"):
        load_initial(instantiate(cfg.model), str(path))


def test_tables_of_relative_positions_lose_the_rows_of_the_cls_token(scenes: Any, tmp_path: Path) -> None:
    path, theirs = FOREIGN["BEiT"].save(tmp_path)
    settings = [f"dataset.image_size={SIDE}", "model.window_size=0", "model.relative_position=bias"]
    cfg = resolve(load_config(TINY, [*scenes.overrides, f"train.init_checkpoint={path}", *settings]))
    net = instantiate(cfg.model).backbone.net
    report = load_backbone(net, path)
    assert not report.missing
    for ours, block in zip(net.blocks, theirs.blocks):
        table = block.attn.relative_position_bias_table
        assert len(table) == 7 * 7 + 3
        assert torch.equal(ours.attn.relative_position_bias_table, table[:-3])


def test_an_encoder_of_no_named_size(scenes: Any, tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=64, width=64, depth=6, num_heads=2)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit).to_metadata())
    cfg = resolve(load_config(TINY, [*scenes.overrides, f"train.init_checkpoint={path}"]))
    assert dict(cfg.model.encoder) == {"width": 64, "depth": 6, "num_heads": 2}
    net = instantiate(cfg.model).backbone.net
    assert all(".rel_pos_" in name for name in load_backbone(net, path).missing)
    windowed = [index for index, block in enumerate(net.blocks) if isinstance(block.attn, WindowAttention)]
    assert (net.width, net.depth, windowed) == (64, 6, [1, 4])
    optimizer = instantiate({**cfg.optimizer, "model": instantiate(cfg.model)})
    rates = {group["lr"] for group in optimizer.param_groups}
    assert min(rates) == pytest.approx(5e-4 * 0.9**7), "six blocks and the embeddings"
