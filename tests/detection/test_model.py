"""Whole detectors against Detectron2's own, built by hand as ViTDet's and Li et al.'s recipes say."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from mae_transfer.detection.config import load_config, resolve
from mae_transfer.detection.model import detections_per_image
from mae_transfer.detection.train import main
from mae_transfer.errors import ConfigError
from tests.detection.small import VITDET, small_detector
from tests.oracles import vitdet, vitdet_keys

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"
# By hand from the two papers: width, depth, heads, drop path of ViTDet and of Li et al.
SIZES = {"b": (768, 12, 12, 0.1, 0.1), "l": (1024, 24, 16, 0.4, 0.3), "h": (1280, 32, 16, 0.5, 0.3)}


@pytest.fixture
def configured(make_scenes: Callable[..., Any]) -> Callable[[str], nn.Module]:
    scenes = make_scenes(num_images=1, side=48)

    def build(name: str) -> nn.Module:
        cfg = resolve(load_config(CONFIGS / f"{name}.py", scenes.overrides))
        with torch.device("meta"):
            return instantiate(cfg.model)

    return build


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mask_rcnn_b_sfp_100ep", "b"),
        ("mask_rcnn_l_sfp_100ep", "l"),
        ("mask_rcnn_h_sfp_75ep", "h"),
        ("cascade_mask_rcnn_b_sfp", "b"),
        ("cascade_mask_rcnn_l_sfp", "l"),
        ("cascade_mask_rcnn_h_sfp", "h"),
    ],
)
def test_vitdets_configs_have_the_parameters_of_detectron2s(
    name: str, size: str, configured: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    width, depth, num_heads, drop_path, _ = SIZES[size]
    cfg = vitdet(
        width=width, depth=depth, num_heads=num_heads, num_classes=2, cascade="cascade" in name, drop_path=drop_path
    )
    # Detectron2 reads its drop path rates off a tensor, which a tensor without storage does not have.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        reference = instantiate(cfg)
    model = configured(name)
    assert shapes(model) == {
        name.replace("backbone.simfp", "backbone.pyramid.simfp"): shape for name, shape in shapes(reference).items()
    }
    ours, theirs = model.backbone.net.blocks, reference.backbone.net.blocks
    assert [block.drop_path.rate for block in ours[1:]] == pytest.approx([b.drop_path.drop_prob for b in theirs[1:]])
    assert [getattr(block.attn, "window_size", 0) for block in ours] == [block.window_size for block in theirs]
    assert model.backbone.padding_constraints["size_divisibility"] == 1024
    assert model.input_format == reference.input_format == "RGB"


class Taps(Backbone):
    """Four maps at strides 4 to 32, without parameters, for Detectron2's FPN to be built on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._out_features = [f"tap{stride}" for stride in (4, 8, 16, 32)]
        self._out_feature_channels = dict.fromkeys(self._out_features, width)
        self._out_feature_strides = {f"tap{stride}": stride for stride in (4, 8, 16, 32)}

    def forward(self, x: Any) -> Any:
        return x


def fpn_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """State of the four-tap detector of Li et al., from Detectron2's heads and FPN and, by hand, what lies below."""
    width, depth, num_heads, *_ = SIZES[size]
    cfg = vitdet(width=width, depth=depth, num_heads=num_heads, num_classes=2)
    cfg.backbone = LazyCall(FPN)(
        bottom_up=LazyCall(Taps)(width=width),
        in_features=[f"tap{stride}" for stride in (4, 8, 16, 32)],
        out_channels=256,
        norm="SyncBN",
        top_block=LazyCall(LastLevelMaxPool)(),
    )
    cfg.roi_heads.box_head.conv_norm = cfg.roi_heads.mask_head.conv_norm = "SyncBN"
    with torch.device("meta"):
        reference = instantiate(cfg)
    expected = {name.replace("backbone.", "backbone.fpn.", 1): shape for name, shape in shapes(reference).items()}
    net = {"pos_embed": (1, 1 + 64 * 64, width), "patch_embed.proj.weight": (width, 3, 16, 16)}
    net["patch_embed.proj.bias"] = (width,)
    for block in range(depth):
        global_attention = (block + 1) % (depth // 4) == 0
        span = 2 * (64 if global_attention else 14) - 1  # offsets in rows and in columns: one table a block
        layers = {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        for layer, shape in layers.items():
            net |= {f"blocks.{block}.{layer}.weight": shape, f"blocks.{block}.{layer}.bias": shape[:1]}
        net[f"blocks.{block}.attn.relative_position_bias_table"] = (span * span, num_heads)
    expected |= {f"backbone.net.{name}": shape for name, shape in net.items()}
    # Stride 4: two transposed convolutions with a norm between them; stride 8: one; 16 and 32 have no parameters.
    for layer in ("0.0", "0.3", "1.0"):
        expected[f"backbone.pyramid.levels.{layer}.weight"] = (width, width, 2, 2)
    for layer in ("0.0", "0.1", "0.3", "1.0"):
        expected[f"backbone.pyramid.levels.{layer}.bias"] = (width,)
    expected["backbone.pyramid.levels.0.1.weight"] = (width,)
    return expected


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_four_tap_configs_have_the_parameters_of_the_recipe(size: str, configured: Callable[[str], nn.Module]) -> None:
    model = configured(f"mask_rcnn_{size}_fpn_100ep")
    assert shapes(model) == fpn_shapes(size)
    assert model.backbone.net.blocks[-1].drop_path.rate == SIZES[size][4]
    quarter = SIZES[size][1] // 4
    assert model.backbone.taps == tuple(range(quarter - 1, 4 * quarter, quarter))


def small(**overrides: Any) -> nn.Module:
    return small_detector(**{"drop_path": 0.0, **overrides})


def test_a_cascade_trains_and_detects_as_detectron2s() -> None:
    """With the same weights, batch and draws: every loss, and every detection."""
    cfg = vitdet(cascade=True, **VITDET)
    torch.manual_seed(0)
    theirs, ours = instantiate(cfg), small(cascade=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.load_state_dict(vitdet_keys(ours.state_dict()), strict=True)

    generator = torch.Generator().manual_seed(1)
    instances = Instances((64, 48))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 44.0, 60.0]]))
    instances.gt_classes = torch.tensor([1, 2])
    instances.gt_masks = BitMasks(torch.ones(2, 64, 48, dtype=torch.bool))
    image = torch.randint(0, 256, (3, 64, 48), dtype=torch.uint8, generator=generator)
    batch = [{"image": image, "instances": instances, "height": 64, "width": 48}]
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(2)  # what both sample regions with
        with EventStorage():
            losses.append({name: float(loss.detach()) for name, loss in model.train()(batch).items()})
    assert {"loss_cls_stage2", "loss_box_reg_stage1", "loss_mask"} <= losses[0].keys()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)
    with torch.no_grad():
        expected, got = (model.eval()(batch)[0]["instances"] for model in (theirs, ours))
    assert len(got) == len(expected)
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3, rtol=1e-4)


def test_detections_per_image_are_known_of_both() -> None:
    for cascade in (False, True):
        assert detections_per_image(small(cascade=cascade, detections_per_image=7)) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "IN"}, "model.norm=IN: expected one of LN, GN, BN, SyncBN"),
        ({"norm": "GN", "channels": 48}, "model.channels=48: model.norm=GN needs a multiple of 32"),
    ],
)
def test_norms_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**arguments)


@pytest.mark.parametrize("name", ["tiny_cascade", "tiny_fpn"])
def test_tiny_siblings_train_and_are_evaluated(name: str, make_scenes: Callable[..., Any], tmp_path: Path) -> None:
    """In bf16, as configured."""
    scenes, run = make_scenes(num_images=2, side=64), tmp_path / "run"
    smaller = ["dataset.image_size=64", "dataset.workers=0", "model.channels=32", "model.box_fc_width=32"]
    smaller += ["model.window_size=3", "train.max_iter=2", "schedule.warmup_iters=1", "train.device=cpu"]
    given = ["--config-file", str(CONFIGS / f"{name}.py"), *scenes.overrides, *smaller, f"train.output_dir={run}"]
    assert main(given) == 0
    assert {"bbox", "segm"} <= json.loads((run / "evaluation.json").read_text()).keys()
    losses = json.loads((run / "metrics.json").read_text().splitlines()[0])
    assert ("loss_cls_stage2" in losses) == (name == "tiny_cascade")
