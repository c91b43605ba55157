"""MAE backbones in Detectron2's classic (yacs) configs: ``add_mae_config`` and the two registered builders.

configs/detection/yacs/ holds base files. Detectron2's own optimizers for these configs are made for ResNets;
``build_optimizer`` gives AdamW with layer decay to a ``DefaultTrainer`` that returns it:

    class Trainer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return mae_transfer.detection.build_optimizer(cfg, model)
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from mae_transfer.checkpoint import IMAGENET_MEAN, IMAGENET_STD, load_checkpoint, read_checkpoint, weights_arguments
from mae_transfer.detection.backbone import MAEBackbone, mae_backbone
from mae_transfer.detection.optimizer import adamw
from mae_transfer.errors import ConfigError

logger = logging.getLogger(__name__)


def add_mae_config(cfg: CfgNode) -> None:
    """Add ``MODEL.MAE`` to a yacs config, and turn its input to what MAE was trained on: RGB, ImageNet mean and std.

    Detectron2's own defaults are BGR and a std of 1, with which a pretrained encoder sees images it never saw. Values
    that are None follow from the size.
    """
    node = CfgNode()
    node.SIZE = "base"
    node.PATCH_SIZE = 16
    node.IMAGE_SIZE = 1024  # the global blocks' relative tables span its grid
    node.POSITION_SIZE = 224
    node.OUT_CHANNELS = 256
    node.NORM = "LN"
    node.WINDOW_SIZE = 14
    node.GLOBAL_BLOCKS = None
    node.RELATIVE_POSITION = "decomposed"  # or bias; empty for none
    node.DROP_PATH = None
    node.CHECKPOINTING = False
    node.SQUARE_SIZE = 0
    node.INIT_CHECKPOINT = ""  # any supported family, loaded strictly; MODEL.WEIGHTS stays empty for training
    node.LAYER_DECAY = 1.0  # these two are of ``build_optimizer``
    node.DECAY_RULE = "clean"
    cfg.MODEL.MAE = node
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [255 * value for value in IMAGENET_MEAN]
    cfg.MODEL.PIXEL_STD = [255 * value for value in IMAGENET_STD]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with ``SOLVER.BASE_LR``, ``SOLVER.WEIGHT_DECAY`` and ``MODEL.MAE.LAYER_DECAY``; see ``optimizer.adamw``."""
    node = _node(cfg)
    return adamw(
        model,
        lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        layer_decay=node.LAYER_DECAY,
        decay_rule=node.DECAY_RULE,
    )


def _node(cfg: CfgNode) -> Any:
    if "MAE" not in cfg.MODEL:
        raise ConfigError("the config has no MODEL.MAE; call mae_transfer.detection.add_mae_config(cfg) first")
    return cfg.MODEL.MAE


def _backbone(cfg: CfgNode, pyramid: str) -> MAEBackbone:
    node = _node(cfg)
    if cfg.INPUT.FORMAT != "RGB":
        raise ConfigError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; MAE encoders are trained on RGB")
    checkpoint = read_checkpoint(node.INIT_CHECKPOINT) if node.INIT_CHECKPOINT else None
    backbone = mae_backbone(
        size=node.SIZE,
        patch_size=node.PATCH_SIZE,
        image_size=node.IMAGE_SIZE,
        position_size=node.POSITION_SIZE,
        pyramid=pyramid,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        window_size=node.WINDOW_SIZE,
        global_blocks=node.GLOBAL_BLOCKS,
        relative_position=node.RELATIVE_POSITION or None,
        drop_path=node.DROP_PATH,
        square_size=node.SQUARE_SIZE,
        checkpointing=node.CHECKPOINTING,
        encoder=weights_arguments(checkpoint.info) if checkpoint else None,
    )
    if checkpoint:
        logger.info("Encoder from %s", load_checkpoint(backbone.net, checkpoint))
    return backbone


@BACKBONE_REGISTRY.register()
def build_mae_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MAEBackbone:
    """ViT and simple feature pyramid (ViTDet) from a yacs config with ``add_mae_config``."""
    return _backbone(cfg, "sfp")


@BACKBONE_REGISTRY.register()
def build_mae_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MAEBackbone:
    """ViT, four taps and FPN (Li et al. 2021) from a yacs config with ``add_mae_config``."""
    return _backbone(cfg, "fpn")
