"""The backbone against Detectron2's own ViT and SimpleFeaturePyramid, and what Detectron2 asks of a backbone."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.modeling import ViT, build_backbone, build_model
from detectron2.modeling.backbone import SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from mae_transfer.detection import MAEBackbone, add_mae_config
from mae_transfer.detection.backbone import mae_backbone
from mae_transfer.errors import ConfigError
from mae_transfer.vit import VisionTransformer

WIDTH, DEPTH, HEADS, GLOBAL = 96, 4, 3, (1, 3)


def ours(*, square_size: int = 0, pyramid: str = "sfp", norm: str = "LN", patch_size: int = 16) -> MAEBackbone:
    net = VisionTransformer(
        image_size=64,
        patch_size=patch_size,
        width=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        cls_token=False,
        final_norm=False,
        window_size=3,  # divides no grid below: windows are padded
        global_blocks=GLOBAL,
        relative_position="decomposed",
        attention_image_size=128,
    )
    return MAEBackbone(net, pyramid=pyramid, out_channels=32, norm=norm, square_size=square_size)


def theirs() -> SimpleFeaturePyramid:
    net = ViT(
        img_size=128,
        patch_size=16,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        window_block_indexes=[block for block in range(DEPTH) if block not in GLOBAL],
        pretrain_img_size=64,
        out_feature="last_feat",
    )
    return SimpleFeaturePyramid(
        net, "last_feat", 32, scale_factors=(4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool(), norm="LN"
    )


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (96, 160)])
def test_equals_detectron2_with_the_same_weights(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    reference = theirs().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.5)  # relative positions too start at zero
    state = {
        name if name.startswith("net.") else f"pyramid.{name}": value for name, value in reference.state_dict().items()
    }
    backbone = ours().eval()
    backbone.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, got = reference(images), backbone(images)
    assert list(got) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    for name, feature in expected.items():
        torch.testing.assert_close(got[name], feature, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pyramid", ["sfp", "fpn"])
@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_strides_do_not_depend_on_the_patch(pyramid: str, patch_size: int) -> None:
    backbone = ours(pyramid=pyramid, patch_size=patch_size)
    features = backbone(torch.randn(1, 3, 64, 128))
    for (name, shape), stride in zip(backbone.output_shape().items(), (4, 8, 16, 32, 64)):
        assert shape.stride == stride
        assert features[name].shape == (1, 32, math.ceil(64 / stride), 128 // stride)


def test_features_are_fp32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = ours()(torch.randn(1, 3, 64, 64))
    assert {feature.dtype for feature in features.values()} == {torch.float32}


def test_images_are_padded_to_the_square_by_detectron2() -> None:
    backbone = ours(square_size=128)
    assert set(backbone.padding_constraints) == {"size_divisibility", "square_size"}
    batch = _batch([torch.ones(3, 40, 70)], backbone)
    assert batch.tensor.shape == (1, 3, 128, 128)
    assert batch.tensor.sum() == 3 * 40 * 70


@pytest.mark.parametrize("count", [1, 2])
def test_an_image_larger_than_the_square_is_never_cropped(count: int) -> None:
    batch = _batch([torch.ones(3, 100, 200)] * count, ours(square_size=128))
    assert batch.tensor.shape == (count, 3, 128, 256)
    assert batch.tensor.sum() == count * 3 * 100 * 200


def _batch(images: list[torch.Tensor], backbone: MAEBackbone) -> ImageList:
    return ImageList.from_tensors(images, backbone.size_divisibility, padding_constraints=backbone.padding_constraints)


@pytest.mark.parametrize("name", ["build_mae_vit_sfp_backbone", "build_mae_vit_fpn_backbone"])
def test_registered_for_yacs(name: str) -> None:
    cfg = get_cfg()
    add_mae_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.MAE.SIZE = "tiny"
    cfg.MODEL.MAE.IMAGE_SIZE = 64
    cfg.MODEL.MAE.NORM = "GN"
    backbone = build_backbone(cfg)
    assert isinstance(backbone, MAEBackbone)
    assert "net.blocks.0.attn.qkv.weight" in backbone.state_dict()
    assert list(backbone(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]


def test_yacs_input_is_what_mae_was_trained_on() -> None:
    cfg = get_cfg()
    add_mae_config(cfg)
    assert cfg.INPUT.FORMAT == "RGB"
    assert pytest.approx([123.675, 116.28, 103.53]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([58.395, 57.12, 57.375]) == cfg.MODEL.PIXEL_STD
    cfg.INPUT.FORMAT = "BGR"
    cfg.MODEL.BACKBONE.NAME = "build_mae_vit_sfp_backbone"
    with pytest.raises(ConfigError, match="RGB"):
        build_backbone(cfg)


def test_images_that_give_no_whole_maps_are_refused() -> None:
    with pytest.raises(ConfigError, match="48x64 px; pad them to multiples of 32"):
        ours()(torch.randn(1, 3, 48, 64))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_detectron2s(checkpointing: bool) -> None:
    torch.manual_seed(0)
    reference, backbone = theirs().train(), ours().train()
    for block in backbone.net.blocks:
        block.checkpointing = checkpointing
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.1)
    state = reference.state_dict()
    backbone.load_state_dict({n if n.startswith("net.") else f"pyramid.{n}": value for n, value in state.items()})
    images = torch.randn(2, 3, 96, 160)
    gradients: list[dict[str, torch.Tensor]] = []
    for model in (backbone, reference):
        features = model(images)
        torch.stack([feature.square().mean() for feature in features.values()]).sum().backward()
        found = {name.removeprefix("pyramid."): p.grad for name, p in model.named_parameters()}
        gradients.append({name: grad for name, grad in found.items() if grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[1].items():
        assert (gradients[0][name] - grad).norm() < 1e-4 * grad.norm(), name


def test_usable_from_a_lazy_config() -> None:
    node = LazyCall(mae_backbone)(size="tiny", patch_size=8, image_size=64, window_size=4)
    assert instantiate(node).net.patch_size == (8, 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="sfp, fpn"):
        ours(pyramid="pan")
    with pytest.raises(ConfigError, match="multiple of 32"):
        ours(square_size=100)


def test_a_whole_yacs_detector_trains_on_it() -> None:
    cfg = get_cfg()
    add_mae_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_mae_vit_sfp_backbone"
    cfg.MODEL.MAE.SIZE = "tiny"
    cfg.MODEL.MAE.IMAGE_SIZE = 64
    cfg.MODEL.MAE.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.CONV_DIMS = [-1]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    model = build_model(cfg).train()
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 50.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    with EventStorage():
        losses = model([{"image": torch.full((3, 64, 64), 128, dtype=torch.uint8), "instances": instances}])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    assert model.backbone.net.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
