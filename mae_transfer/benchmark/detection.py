"""The detection backbone, step and inference: ours and Detectron2's own, from the same weights, in turns.

The peer is Detectron2's ViT and SimpleFeaturePyramid as its ViTDet configs build them. For whole steps and inference
both carry the same heads, which are Detectron2's; the peer's step is its ``SimpleTrainer`` with its parameter groups
and torch's AdamW (its trainer for mixed precision refuses a CPU, so there autocast is put around its step).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mae_transfer.benchmark import transfer
from mae_transfer.benchmark.measure import race
from mae_transfer.benchmark.transfer import Comparison, Forward, ForwardBackward, Run, check_same_maps, speed_table
from mae_transfer.errors import require
from mae_transfer.sizes import get_size

PARTS = {
    "forward": "the backbone forward, without gradients",
    "forward-backward": "the backbone forward and backward",
    "step": "a whole training step of Mask R-CNN",
    "latency": "inference of one image",
    "memory": "peak memory of the backbone forward and backward",
    "evaluation": "COCO evaluation (see tools/benchmark.py evaluation)",
}
_INSTANCES = 7  # an image, as in COCO
_CLASSES = 80


@dataclass(frozen=True, kw_only=True)
class Setting(transfer.Setting):
    """The recipe of ViTDet at a size."""

    def imports(self) -> None:
        _detectron2("modeling.backbone.vit")
        importlib.import_module("mae_transfer.detection.model")

    def backbone(self, *, peer: bool) -> nn.Module:
        """Ours, or Detectron2's with the weights of ours."""
        from mae_transfer.detection.backbone import mae_backbone

        torch.manual_seed(self.seed)
        ours = mae_backbone(size=self.size, image_size=self.image_size, position_size=224)
        for name, parameter in ours.named_parameters():
            if "rel_pos" in name:  # zero to begin with
                nn.init.normal_(parameter, std=0.02)
        return detectron2_backbone(ours, self) if peer else ours

    def detector(self, *, peer: bool) -> nn.Module:
        """Mask R-CNN, the heads Detectron2's own in either."""
        from mae_transfer.checkpoint import IMAGENET_MEAN, IMAGENET_STD
        from mae_transfer.detection.model import mask_rcnn

        torch.manual_seed(self.seed)
        model = mask_rcnn(
            num_classes=_CLASSES,
            image_size=self.image_size,
            pixel_mean=[255 * value for value in IMAGENET_MEAN],
            pixel_std=[255 * value for value in IMAGENET_STD],
            size=self.size,
            position_size=224,
        )
        if peer:
            model.backbone = detectron2_backbone(model.backbone, self)
        return model

    def batch(self) -> list[dict[str, Any]]:
        """Noise with polygons, as Detectron2's loader gives it."""
        structures = _detectron2("structures")
        generator = torch.Generator().manual_seed(self.seed)
        side, inputs = self.image_size, []
        for _ in range(self.batch_size):
            corners = torch.rand(_INSTANCES, 2, generator=generator) * side / 2
            sizes = (0.1 + 0.4 * torch.rand(_INSTANCES, 2, generator=generator)) * side
            boxes = torch.cat([corners, corners + sizes], dim=1)
            instances = structures.Instances((side, side))
            instances.gt_boxes = structures.Boxes(boxes)
            instances.gt_classes = torch.randint(_CLASSES, (_INSTANCES,), generator=generator)
            instances.gt_masks = structures.PolygonMasks(
                [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
            )
            image = torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)
            inputs.append({"image": image, "instances": instances, "height": side, "width": side})
        return inputs


def detectron2_backbone(ours: nn.Module, setting: Setting) -> nn.Module:
    """Detectron2's ViT and SimpleFeaturePyramid as in its ViTDet configs, with the weights of ``ours``."""
    modeling = _detectron2("modeling.backbone")
    numbers = get_size(setting.size)
    net = modeling.ViT(
        img_size=setting.image_size,
        patch_size=16,
        embed_dim=numbers.width,
        depth=numbers.depth,
        num_heads=numbers.num_heads,
        drop_path_rate=numbers.sfp_drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        window_block_indexes=[block for block in range(numbers.depth) if block not in numbers.quarter_blocks],
        pretrain_img_size=224,
        out_feature="last_feat",
    )
    peer: nn.Module = modeling.SimpleFeaturePyramid(
        net,
        "last_feat",
        256,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=_detectron2("modeling.backbone.fpn").LastLevelMaxPool(),
        norm="LN",
    )
    state = {name.removeprefix("pyramid."): value for name, value in ours.state_dict().items()}
    peer.load_state_dict(state, strict=True)
    return peer


def check_same_features(setting: Setting) -> None:
    """Raises RunFailed unless both give the same features of two images."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    check_same_maps(setting, images, "Detectron2")


class TrainingStep(Run):
    def set_up(self) -> None:
        from mae_transfer.detection.optimizer import adamw
        from mae_transfer.detection.trainer import Trainer
        from mae_transfer.engine.precision import Precision

        model = self.setting.detector(peer=self.peer).train()
        batches = _Forever(self.setting.batch())
        self.trainer: Any
        if self.peer:
            decay = partial(
                _detectron2("modeling").get_vit_lr_decay_rate,
                num_layers=get_size(self.setting.size).depth,
                lr_decay_rate=0.7,
            )
            groups = _detectron2("solver.build").get_default_optimizer_params(
                model,
                base_lr=1e-4,
                weight_decay_norm=0.0,
                lr_factor_func=decay,
                overrides={"pos_embed": {"weight_decay": 0.0}},
            )
            self.trainer = _detectron2("engine").SimpleTrainer(
                model, batches, torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1)
            )
        else:
            optimizer = adamw(model, layer_decay=0.7, decay_rule="parity")
            precision = Precision(self.setting.precision, torch.device("cpu"))
            self.trainer = Trainer(model, batches, optimizer, precision=precision, seed=self.setting.seed)
        self.trainer.iter = 0

    def turn(self) -> None:
        with (
            _detectron2("utils.events").EventStorage() as self.trainer.storage,
            self.setting.autocast() if self.peer else nullcontext(),
        ):
            self.trainer.run_step()


class Latency(Run):
    def set_up(self) -> None:
        self.model = self.setting.detector(peer=self.peer).eval()
        self.inputs = self.setting.batch()[:1]

    def turn(self) -> None:
        with torch.no_grad(), self.setting.autocast():
            self.model(self.inputs)


def _detectron2(module: str) -> ModuleType:
    return require(f"detectron2.{module}", "detection")


class _Forever:
    """One batch again and again."""

    def __init__(self, batch: list[dict[str, Any]]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            yield self.batch


RUNS: dict[str, type[Run]] = {
    "forward": Forward,
    "forward-backward": ForwardBackward,
    "step": TrainingStep,
    "latency": Latency,
    "memory": ForwardBackward,
}


def _evaluation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from mae_transfer.benchmark import evaluation

    results = []
    for kind in evaluation.KINDS:
        print(f"\nCOCO evaluation of {kind}: 500 images, 60 detections each")
        pair = evaluation.contestants(kind, num_images=500, detections=60)
        timings = race(pair, rounds=arguments.rounds, threads=arguments.threads, max_seconds=arguments.max_seconds)
        print(speed_table(timings))
        results.append({"part": f"evaluation of {kind}", "seconds": {t.name: t.seconds for t in timings}})
    return results


COMPARISON = Comparison(
    peer="detectron2",
    setting=Setting,
    parts=PARTS,
    runs=RUNS,
    default=("forward", "forward-backward", "latency", "memory"),
    single=("latency",),
    check=lambda size: check_same_features(Setting(size=size)),
    others={"evaluation": _evaluation},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tools/benchmark.py detection`` accepts."""
    transfer.add_arguments(parser, COMPARISON)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for counts below 1 and sizes without Detectron2's counterpart."""
    return transfer.run(arguments, COMPARISON)
