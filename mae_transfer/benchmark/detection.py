"""The detection backbone, step and inference: ours and Detectron2's own, from the same weights, in turns.

The peer is Detectron2's ViT and SimpleFeaturePyramid as its ViTDet configs build them. For whole steps and inference
both carry the same heads, which are Detectron2's; the peer's step is its ``SimpleTrainer`` with its parameter groups
and torch's AdamW (its trainer for mixed precision refuses a CPU, so there autocast is put around its step).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mae_transfer.benchmark.measure import (
    Contestant,
    Spread,
    Timing,
    environment,
    peak_memory,
    race,
    ratios,
    table,
    write_json,
)
from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.errors import ConfigError, RunFailed, require
from mae_transfer.sizes import get_size

PARTS = {
    "forward": "the backbone forward, without gradients",
    "forward-backward": "the backbone forward and backward",
    "step": "a whole training step of Mask R-CNN",
    "latency": "inference of one image",
    "memory": "peak memory of the backbone forward and backward",
    "evaluation": "COCO evaluation (see tools/benchmark.py evaluation)",
}
CONTESTANTS = ("ours", "detectron2", "detectron2-keep")
_AGREEMENT = 1e-3  # of two images' features, which are of order 1, in fp32
_INSTANCES = 7  # an image, as in COCO
_CLASSES = 80


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is computed: the recipe of ViTDet at a size."""

    size: str = "base"
    image_size: int = 512
    batch_size: int = 1
    precision: str = "fp32"
    seed: int = 0

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

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

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=generator)

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
    ours, peer = (setting.backbone(peer=peer).eval() for peer in (False, True))
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = peer(images), ours(images)
    worst = max((found[name] - expected[name]).abs().max().item() for name in expected)
    if not worst <= _AGREEMENT:
        raise RunFailed(f"features of ours and of Detectron2 differ by {worst:.6f}: not the same computation")


class Run(Contestant):
    """A part of the benchmark by one of ``CONTESTANTS``."""

    def __init__(self, name: str, setting: Setting) -> None:
        if name not in CONTESTANTS:
            raise ConfigError(f"no contestant {name!r}; there are {', '.join(CONTESTANTS)}")
        self.name = name
        self.setting = setting
        self.peer = name != "ours"
        self.keep = name != "detectron2"  # our training has the allocator keep what is freed

    def imports(self) -> None:
        _detectron2("modeling.backbone.vit")
        importlib.import_module("mae_transfer.detection.model")
        if self.keep:
            keep_freed_memory()


class Forward(Run):
    def set_up(self) -> None:
        self.backbone = self.setting.backbone(peer=self.peer).eval()
        self.images = self.setting.images()

    def turn(self) -> None:
        with torch.no_grad(), self.setting.autocast():
            self.backbone(self.images)


class ForwardBackward(Run):
    def set_up(self) -> None:
        self.backbone = self.setting.backbone(peer=self.peer).train()
        self.images = self.setting.images()

    def turn(self) -> None:
        with self.setting.autocast():
            features = self.backbone(self.images)
        torch.stack([feature.float().square().mean() for feature in features.values()]).sum().backward()
        self.backbone.zero_grad(set_to_none=True)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tools/benchmark.py detection`` accepts."""
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=["forward", "forward-backward", "latency", "memory"],
        help="; ".join(f"{name}: {about}" for name, about in PARTS.items())
        + " (default: forward forward-backward latency memory)",
    )
    parser.add_argument("--size", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--image-size", type=int, nargs="+", default=[512], help="pixels, one or more (default: 512)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="(both)")
    parser.add_argument("--batch-size", type=int, default=1, help="images a step (default: %(default)s)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=["ours", "detectron2"],
        help="the first is held against the others. “keep” is the allocator setting that our training uses on CPUs, "
        "given to the peer too (default: ours detectron2)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all: %(default)s)")
    parser.add_argument("--max-seconds", type=float, help="of each part: begin no further round after so long")
    parser.add_argument("--json", metavar="FILE", help="write every number there too")


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for counts below 1 and sizes without Detectron2's counterpart."""
    if min(arguments.rounds, arguments.threads, arguments.batch_size, *arguments.image_size) < 1:
        raise ConfigError("--rounds, --threads, --batch-size and --image-size must be at least 1")
    if any(side % 32 for side in arguments.image_size):
        raise ConfigError("--image-size must be a multiple of 32, the stride of p5")
    if get_size(arguments.size).patch_size != 16:
        raise ConfigError(
            f"--size {arguments.size}: ViTDet's models have patches of 16 px; use tiny, small, base or large"
        )
    facts = environment(arguments.threads)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    results: list[dict[str, Any]] = []
    if set(arguments.parts) & set(RUNS):
        check_same_features(Setting(size=arguments.size))
    for part in arguments.parts:
        if part == "evaluation":
            results += _evaluation(arguments)
            continue
        for image_size in arguments.image_size:
            for precision in arguments.precision:
                setting = Setting(
                    size=arguments.size, image_size=image_size, batch_size=arguments.batch_size, precision=precision
                )
                results.append(_measure(part, setting, arguments))
    write_json(arguments.json, {"environment": facts, "results": results})
    return 0


def _measure(part: str, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    batch = 1 if part == "latency" else setting.batch_size
    print(f"\n{PARTS[part]}: {setting.size}, {setting.image_size} px, batch {batch}, {setting.precision}")
    contestants = [RUNS[part](name, setting) for name in arguments.contestants]
    facts = {"part": part, **asdict(setting)}
    if part == "memory":
        peaks = peak_memory(contestants, turns=2, threads=arguments.threads)
        print(memory_table(peaks))
        return {**facts, "memory_bytes": peaks}
    timings = race(contestants, rounds=arguments.rounds, threads=arguments.threads, max_seconds=arguments.max_seconds)
    print(speed_table(timings))
    memory = {timing.name: timing.memory_bytes for timing in timings}
    return {**facts, "seconds": {timing.name: timing.seconds for timing in timings}, "memory_bytes": memory}


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


def speed_table(timings: Sequence[Timing]) -> str:
    """The first is held against the others: a ratio above 1 says that it is so many times as fast."""
    first = timings[0]
    rows = [
        [
            timing.name,
            Spread.of(timing.seconds).show(3),
            "" if timing is first else ratios(timing.seconds, first.seconds).show(),
            f"{timing.memory_bytes / 2**30:.2f}",
        ]
        for timing in timings
    ]
    return table(["", "seconds", f"{first.name} is faster by", "peak GiB"], rows)


def memory_table(peaks: dict[str, int]) -> str:
    """The first one's share of each other's peak."""
    first = next(iter(peaks.values()))
    rows = [[name, f"{peak / 2**30:.2f}", f"{first / peak:.2f}"] for name, peak in peaks.items()]
    return table(["", "peak GiB above imports", "first over this"], rows)
