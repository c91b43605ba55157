"""Layer decay against the paper's rule, parameter by parameter (Detectron2's and MMSegmentation's functions are
compared in tests/detection and tests/segmentation)."""

from __future__ import annotations

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from mae_transfer import build_vit
from mae_transfer.errors import ConfigError
from mae_transfer.layer_decay import freeze_blocks, layer_id, layer_scale, parameter_groups


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "backbone.net.", "module.backbone.net.", "model.backbone._orig_mod."]
)
def test_ids_under_every_host(prefix: str) -> None:
    expected = {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "blocks.0.norm1.weight": 1,
        "blocks.11.mlp.fc2.bias": 12,
        "blocks.3.attn.rel_pos_h": 4,
        "blocks.3.attn.relative_position_bias_table": 4,
        "norm.weight": 13,
        "fc_norm.weight": 13,
    }
    assert {name: layer_id(prefix + name, 12) for name in expected} == expected


@pytest.mark.parametrize(
    "name",
    [
        "backbone.simfp_2.0.weight",
        "roi_heads.box_head.fc1.weight",
        "decode_head.conv_seg.weight",
        "neck.levels.0.0.weight",
        "decode_head.blocks.3.weight",
        "head.weight",
    ],
)
def test_heads_and_pyramids_have_the_full_rate(name: str) -> None:
    assert layer_scale(name, depth=12, rate=0.5) == 1.0


def test_rule_of_the_paper() -> None:
    assert layer_scale("pos_embed", depth=12, rate=0.7) == pytest.approx(0.7**13)
    assert layer_scale("blocks.0.norm1.weight", depth=12, rate=0.7) == pytest.approx(0.7**12)
    assert layer_scale("blocks.11.norm1.weight", depth=12, rate=0.7) == pytest.approx(0.7)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_vit("tiny", image_size=32, patch_size=8)
        self.head = nn.Linear(192, 5)


def test_groups_equal_timm_and_hold_every_parameter_once() -> None:
    """timm derives the layers from its own model's structure, not from our names."""
    import timm

    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    ours = build_vit("tiny")
    wrapped = nn.ModuleDict({"backbone": ours, "head": nn.Linear(192, 5)})
    groups = parameter_groups(wrapped, depth=12, rate=0.65, lr=2e-3, weight_decay=0.05)
    mine = {
        name.removeprefix("backbone."): (group["lr"] / 2e-3, group["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    assert len(mine) == sum(len(g["names"]) for g in groups) == len(list(wrapped.parameters()))
    names = {id(p): n for n, p in theirs.named_parameters()}
    timm_groups = param_groups_layer_decay(
        theirs, weight_decay=0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.65
    )
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in timm_groups for p in g["params"]}
    assert set(mine) == set(expected)
    # timm puts the final norm with the last block; the released MAE code and ViTDet leave it with the heads.
    for part in ("weight", "bias"):
        assert mine.pop(f"norm.{part}") == (1.0, 0.0)
        assert expected.pop(f"norm.{part}") == (0.65, 0.0)
    for name in expected:
        assert mine[name] == pytest.approx(expected[name]), name


def test_frozen_and_shared_parameters() -> None:
    model = Classifier()
    model.backbone.pos_embed.requires_grad_(False)
    model.again = model.head
    groups = parameter_groups(model, depth=12, rate=0.7, lr=1.0, weight_decay=0.1)
    names = [name for group in groups for name in group["names"]]
    assert "backbone.pos_embed" not in names
    assert names.count("head.weight") == 1 and "again.weight" not in names
    optimizer = torch.optim.AdamW(groups)
    assert optimizer.param_groups[-1]["lr"] == 1.0


def test_freezing_takes_the_embeddings_and_the_first_blocks() -> None:
    model = Classifier()
    # A table of blocks 1 and 2, as bias tables are shared in the four-tap detector.
    shared = torch.nn.Parameter(torch.zeros(3))
    model.backbone.blocks[1].table = model.backbone.blocks[2].table = shared
    assert freeze_blocks(model, depth=12, num_blocks=0) == []
    frozen = freeze_blocks(model, depth=12, num_blocks=2)
    assert sorted(frozen) == sorted(name for name, p in model.named_parameters() if not p.requires_grad)
    parts = {".".join(name.split(".")[1 : 3 if ".blocks." in name else 2]) for name in frozen}
    assert parts == {"cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1"}
    assert shared.requires_grad
    freeze_blocks(model, depth=12, num_blocks=12)
    assert not any(".blocks." in name for name, p in model.named_parameters() if p.requires_grad)
    assert model.head.weight.requires_grad


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="block 12, but layer decay was set up for 12"):
        layer_id("backbone.blocks.12.norm1.weight", 12)
    with pytest.raises(ConfigError, match="cannot freeze 13 blocks: the encoder has 12"):
        freeze_blocks(Classifier(), depth=12, num_blocks=13)
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        parameter_groups([], depth=12, rate=1.5, lr=1, weight_decay=0)
