"""Learning rates and weight decay, parameter by parameter, against what Detectron2 gives its own ViTDet."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from detectron2.modeling import ViT, get_vit_lr_decay_rate
from detectron2.modeling.backbone import SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from mae_transfer.detection.model import mask_rcnn
from mae_transfer.detection.optimizer import adamw, schedule
from mae_transfer.errors import ConfigError

RATE, LR, DECAY = 0.7, 1e-4, 0.1


def detector(**overrides: object) -> nn.Module:
    arguments = {
        "num_classes": 2,
        "image_size": 64,
        "pixel_mean": [0, 0, 0],
        "pixel_std": [1, 1, 1],
        "size": "tiny",
        "patch_size": 16,
        "channels": 16,
        "box_fc_width": 32,
        "window_size": 3,
    }
    return mask_rcnn(**{**arguments, **overrides})  # type: ignore[arg-type]


def theirs() -> nn.Module:
    """Our detector with Detectron2's backbone in place of ours."""
    model = detector()
    net = ViT(
        img_size=64,
        embed_dim=192,
        depth=12,
        num_heads=3,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        pretrain_img_size=64,
        out_feature="last_feat",
    )
    model.backbone = SimpleFeaturePyramid(
        net, "last_feat", 16, scale_factors=(4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool(), norm="LN"
    )
    return model


def settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Name -> (learning rate, weight decay)."""
    by_id = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rule", ["parity", "all"])
def test_equals_detectron2s_vitdet(rule: str) -> None:
    reference = theirs()
    groups = get_default_optimizer_params(
        reference,
        base_lr=LR,
        weight_decay=DECAY,
        weight_decay_norm=0.0 if rule == "parity" else None,
        overrides={"pos_embed": {"weight_decay": 0.0}} if rule == "parity" else {},
        lr_factor_func=partial(get_vit_lr_decay_rate, lr_decay_rate=RATE, num_layers=12),
    )
    expected = settings(torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY), reference)
    model = detector()
    got = settings(
        adamw(model, lr=LR, weight_decay=DECAY, layer_decay=RATE, decay_rule=rule),
        model,
    )
    # Names differ only in that our pyramid is a module of its own.
    got = {name.replace("backbone.pyramid.", "backbone."): value for name, value in got.items()}
    assert got.keys() == expected.keys()
    for name, (lr, decay) in expected.items():
        assert got[name][0] == pytest.approx(lr), name
        assert got[name][1] == decay, name


def test_clean_rule_spares_norms_biases_and_positions() -> None:
    model = detector()
    got = settings(adamw(model, lr=LR, weight_decay=DECAY, decay_rule="clean"), model)
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or "pos_embed" in name or "rel_pos" in name
        assert got[name][1] == (0.0 if spared else DECAY), name


def test_layer_decay_of_a_four_tap_detector_reaches_the_embeddings() -> None:
    model = detector(pyramid="fpn", norm="GN", channels=32)
    got = settings(adamw(model, lr=LR, layer_decay=RATE), model)
    assert got["backbone.net.patch_embed.proj.weight"][0] == pytest.approx(LR * RATE**13)
    assert got["backbone.net.blocks.0.attn.qkv.weight"][0] == pytest.approx(LR * RATE**12)
    assert got["backbone.net.blocks.11.mlp.fc2.bias"][0] == pytest.approx(LR * RATE)
    assert got["backbone.fpn.fpn_lateral2.weight"][0] == pytest.approx(LR)
    assert got["roi_heads.mask_head.predictor.weight"][0] == pytest.approx(LR)


def test_vitdets_schedule() -> None:
    # Detectron2's configs/COCO/mask_rcnn_vitdet_b_100ep.py in numbers.
    factor = schedule(max_iter=184375)
    assert factor(0) == pytest.approx(0.001)
    assert factor(250 / 184375) == pytest.approx(1)
    for iteration, expected in ((163_880, 1), (163_890, 0.1), (177_540, 0.1), (177_550, 0.01)):
        assert factor(iteration / 184375) == pytest.approx(expected)


def test_cosine_ends_at_zero() -> None:
    factor = schedule(max_iter=1000, kind="cosine", warmup_iters=10)
    assert factor(0.5) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factor(1.0) == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_iters=250"):
        schedule(max_iter=100)
    with pytest.raises(ConfigError, match="steps or cosine"):
        schedule(max_iter=1000, kind="step")
    with pytest.raises(ConfigError, match="clean, parity, all"):
        adamw(detector(), decay_rule="none")
    with pytest.raises(ConfigError, match="anchor_sizes"):
        detector(anchor_sizes=[8, 16])
