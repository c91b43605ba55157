"""Independent implementations that tests compare with, and the key mappings that carry weights to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain import MaskedAutoencoder


def hf_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our MAE state dict in the names of Hugging Face's ViTMAEForPreTraining (written from its module tree)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            new = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}.get(name)
            out[new or name.replace("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")] = tensor
        elif name.startswith("norm."):
            out["vit.layernorm." + name[5:]] = tensor
        elif name.startswith(("blocks.", "decoder_blocks.")):
            room, index, rest = name.split(".", 2)
            layer = f"{'vit.layers' if room == 'blocks' else 'decoder.decoder_layers'}.{index}"
            if rest.startswith("attn.qkv."):
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}.attention.{part}_proj.{rest[9:]}"] = piece
            else:
                rest = rest.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
                out[f"{layer}.{rest.replace('attn.proj', 'attention.o_proj')}"] = tensor
        else:
            out["decoder." + name] = tensor
    return out


def hf_mae(model: MaskedAutoencoder) -> torch.nn.Module:
    """A ViTMAEForPreTraining with the weights of ``model``, in its dtype."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=4 * model.width,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=model.image_size[0],
        patch_size=model.patch_size[0],
        num_channels=model.num_channels,
        decoder_num_attention_heads=model.decoder_num_heads,
        decoder_hidden_size=model.decoder_width,
        decoder_num_hidden_layers=model.decoder_depth,
        decoder_intermediate_size=4 * model.decoder_width,
        mask_ratio=model.mask_ratio,
        norm_pix_loss=model.norm_pix_loss,
        attn_implementation="sdpa",
    )
    oracle = ViTMAEForPreTraining(config).to(model.pos_embed.dtype)
    oracle.load_state_dict(hf_keys(model.state_dict()), strict=True)
    return oracle


def vitdet(
    *,
    width: int,
    depth: int,
    num_heads: int,
    cascade: bool = False,
    num_classes: int = 80,
    image_size: int = 1024,
    pretrain_image_size: int = 224,
    window_size: int = 14,
    channels: int = 256,
    box_fc_width: int = 1024,
    drop_path: float = 0.0,
) -> Any:
    """LazyConfig of ViTDet's detector: the model of Detectron2's own zoo, changed by hand as ViTDet's configs do.

    The defaults are the releases' (the zoo's model is ViT-B); ``instantiate`` builds it of Detectron2's modules alone.
    """
    from detectron2 import model_zoo
    from detectron2.config import LazyCall
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    quarter = depth // 4
    model.backbone.net.update(
        img_size=image_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        drop_path_rate=drop_path,
        window_size=window_size,
        window_block_indexes=[block for block in range(depth) if block % quarter != quarter - 1],
        pretrain_img_size=pretrain_image_size,
    )
    model.backbone.update(out_channels=channels, square_pad=image_size)
    model.proposal_generator.head.in_channels = channels
    roi_heads = model.roi_heads
    roi_heads.num_classes = num_classes
    for head, convs in (("box_head", 4), ("mask_head", 5)):
        roi_heads[head].conv_dims = [channels] * convs
        roi_heads[head].input_shape.channels = channels
    roi_heads.box_head.fc_dims = [box_fc_width]
    roi_heads.box_predictor.input_shape.channels = box_fc_width
    if not cascade:
        return model
    for name in ("box_head", "box_predictor", "proposal_matcher"):
        roi_heads.pop(name)

    def box_head() -> Any:
        shape = ShapeSpec(channels=channels, height=7, width=7)
        return LazyCall(FastRCNNConvFCHead)(
            input_shape=shape, conv_dims=[channels] * 4, fc_dims=[box_fc_width], conv_norm="LN"
        )

    def box_predictor(weights: Sequence[int]) -> Any:
        return LazyCall(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=box_fc_width),
            test_score_thresh=0.05,
            box2box_transform=LazyCall(Box2BoxTransform)(weights=weights),
            cls_agnostic_bbox_reg=True,
            num_classes=num_classes,
        )

    roi_heads.update(
        _target_=CascadeROIHeads,
        box_heads=[box_head() for _ in range(3)],
        box_predictors=[box_predictor(w) for w in ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))],
        proposal_matchers=[
            LazyCall(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in (0.5, 0.6, 0.7)
        ],
    )
    return model


def vitdet_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our detector's state dict in the names of Detectron2's ViTDet, whose pyramid is part of the backbone."""
    return {name.replace("backbone.pyramid.simfp", "backbone.simfp"): tensor for name, tensor in state.items()}
