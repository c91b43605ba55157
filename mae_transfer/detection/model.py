"""Mask R-CNN and Cascade Mask R-CNN of Detectron2's parts around the MAE backbone; every default is ViTDet's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from torch import nn

from mae_transfer.detection.backbone import LEVELS, mae_backbone
from mae_transfer.errors import ConfigError
from mae_transfer.pyramid import STRIDES

_ROI_LEVELS = list(LEVELS[:4])
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_NORMS = ("LN", "GN", "BN", "SyncBN")
_GN_GROUPS = 32  # Detectron2's
_BOX_SIDE, _MASK_SIDE = 7, 14  # of the features that RoIAlign cuts out for the heads
# Each stage's IoU from which a region is an object, and its weights of the box regression (centre, then size).
_SINGLE_STAGE = ((0.5, (10.0, 10.0, 5.0, 5.0)),)
_CASCADE_STAGES = (*_SINGLE_STAGE, (0.6, (20.0, 20.0, 10.0, 10.0)), (0.7, (30.0, 30.0, 15.0, 15.0)))


def mask_rcnn(
    *,
    num_classes: int,
    image_size: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    square_size: int = 0,
    size: str = "base",
    patch_size: int | None = None,
    position_size: int | None = None,
    pyramid: str = "sfp",
    channels: int = 256,
    norm: str = "LN",
    window_size: int = 14,
    global_blocks: Sequence[int] | None = None,
    relative_position: str | None = "decomposed",
    drop_path: float | None = None,
    checkpointing: bool = False,
    encoder: Mapping[str, Any] | None = None,
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
    rpn_convs: int = 2,
    rpn_anchors_per_image: int = 256,
    proposals_train: int = 1000,
    proposals_test: int = 1000,
    rois_per_image: int = 512,
    box_convs: int = 4,
    box_fcs: int = 1,
    box_fc_width: int = 1024,
    mask_convs: int = 4,
    cascade: bool = False,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    detections_per_image: int = 100,
) -> GeneralizedRCNN:
    """Mask R-CNN or Cascade Mask R-CNN on an MAE encoder.

    The first five arguments follow from the data and are filled in by ``config.resolve``: they have one place each.

    Args:
        num_classes: categories of the data.
        image_size: side of the training images in pixels.
        pixel_mean, pixel_std: RGB, on the scale 0..255 of Detectron2's pixels.
        square_size: pad images to squares of this size; 0 for whole maps only.
        size, patch_size, position_size, pyramid, window_size, global_blocks, relative_position, drop_path,
            checkpointing, encoder: of the encoder, see ``mae_backbone``. ``patch_size`` and ``encoder`` None are the
            checkpoint's.
        channels: of the pyramid and of the convolutions in the heads.
        norm: of the pyramid and of the box and mask heads: "LN", "GN", "BN" or "SyncBN".
        anchor_sizes: side of the anchors on p2 to p6 in pixels.
        rpn_convs: 3x3 convolutions before the RPN's two outputs.
        rpn_anchors_per_image: anchors that the RPN's loss samples.
        proposals_train, proposals_test: proposals kept after the RPN's non-maximum suppression.
        rois_per_image: regions that the box head's loss samples; at most a quarter is foreground and trains masks.
        box_convs, box_fcs, box_fc_width, mask_convs: depth of the heads.
        cascade: three box heads in a row, each on the boxes of the one before and held to a higher IoU (Cai and
            Vasconcelos 2018); they regress one box for all classes, as ViTDet's released ones do.
        score_threshold, nms_threshold, detections_per_image: what is kept as a detection.

    Raises:
        ConfigError: numbers that do not fit together.
    """
    if len(anchor_sizes) != len(LEVELS):
        raise ConfigError(
            f"model.anchor_sizes={list(anchor_sizes)}: expected {len(LEVELS)} sizes, for {', '.join(LEVELS)}"
        )
    if norm not in _NORMS:
        raise ConfigError(f"model.norm={norm}: expected one of {', '.join(_NORMS)}")
    if norm == "GN" and channels % _GN_GROUPS:
        raise ConfigError(f"model.channels={channels}: model.norm=GN needs a multiple of {_GN_GROUPS}")
    backbone = mae_backbone(
        size=size,
        patch_size=patch_size,
        image_size=image_size,
        position_size=position_size,
        pyramid=pyramid,
        out_channels=channels,
        norm=norm,
        window_size=window_size,
        global_blocks=global_blocks,
        relative_position=relative_position,
        drop_path=drop_path,
        square_size=square_size,
        checkpointing=checkpointing,
        encoder=encoder,
    )
    rpn = RPN(
        in_features=list(LEVELS),
        head=StandardRPNHead(in_channels=channels, num_anchors=len(_ASPECT_RATIOS), conv_dims=[-1] * rpn_convs),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[side] for side in anchor_sizes],
            aspect_ratios=[list(_ASPECT_RATIOS)],
            strides=[backbone.output_shape()[level].stride for level in LEVELS],
            offset=0.0,
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=rpn_anchors_per_image,
        positive_fraction=0.5,
        pre_nms_topk=(2 * proposals_train, proposals_test),
        post_nms_topk=(proposals_train, proposals_test),
        nms_thresh=0.7,
    )
    stages = _CASCADE_STAGES if cascade else _SINGLE_STAGE
    box_heads = [
        FastRCNNConvFCHead(
            ShapeSpec(channels=channels, height=_BOX_SIDE, width=_BOX_SIDE),
            conv_dims=[channels] * box_convs,
            fc_dims=[box_fc_width] * box_fcs,
            conv_norm=norm,
        )
        for _ in stages
    ]
    box_predictors = [
        FastRCNNOutputLayers(
            box_head.output_shape,
            box2box_transform=Box2BoxTransform(weights=weights),
            num_classes=num_classes,
            cls_agnostic_bbox_reg=cascade,
            test_score_thresh=score_threshold,
            test_nms_thresh=nms_threshold,
            test_topk_per_image=detections_per_image,
        )
        for box_head, (_, weights) in zip(box_heads, stages)
    ]
    matchers = [Matcher([iou], [0, 1], allow_low_quality_matches=False) for iou, _ in stages]
    shared = {
        "num_classes": num_classes,
        "batch_size_per_image": rois_per_image,
        "positive_fraction": 0.25,
        "box_in_features": _ROI_LEVELS,
        "box_pooler": _pooler(_BOX_SIDE),
        "mask_in_features": _ROI_LEVELS,
        "mask_pooler": _pooler(_MASK_SIDE),
        "mask_head": MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=channels, height=_MASK_SIDE, width=_MASK_SIDE),
            num_classes=num_classes,
            conv_dims=[channels] * (mask_convs + 1),  # the last is the transposed convolution
            conv_norm=norm,
        ),
    }
    if cascade:
        roi_heads = CascadeROIHeads(
            box_heads=box_heads, box_predictors=box_predictors, proposal_matchers=matchers, **shared
        )
    else:
        roi_heads = StandardROIHeads(
            box_head=box_heads[0], box_predictor=box_predictors[0], proposal_matcher=matchers[0], **shared
        )
    return GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=roi_heads,
        pixel_mean=tuple(pixel_mean),
        pixel_std=tuple(pixel_std),
        input_format="RGB",
    )


def detections_per_image(model: GeneralizedRCNN) -> int:
    """How many detections a model built by ``mask_rcnn`` keeps of an image."""
    predictor: Any = model.roi_heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # the cascade's stages
        predictor = predictor[-1]
    return int(predictor.test_topk_per_image)


def _pooler(side: int) -> ROIPooler:
    return ROIPooler(
        output_size=side,
        scales=[1 / stride for stride in STRIDES],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )
