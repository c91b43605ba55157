"""What the demo runs: its commands in order, in which sizes, and where everything lies below its output folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout, which holds tools/ and configs/


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of everything."""

    side: int = 128  # of a scene, pixels
    unlabelled: int
    train: int
    val: int
    pretrain: tuple[str, ...]  # overrides of configs/pretrain/tiny.yaml
    detection: tuple[str, ...]  # of configs/detection/tiny.py
    segmentation: tuple[str, ...]  # of configs/segmentation/upernet_tiny.py
    classification: tuple[str, ...]  # of configs/classification/tiny_finetune.yaml
    pretrain_steps: int
    detection_iters: int
    segmentation_iters: int
    classification_steps: int
    seconds: tuple[int, int, int, int, int]  # scenes, pretraining, a run of each task: two quiet cores


# Scenes are twice as wide as pretraining's 64-pixel crops: the smaller crops, a fifth of the area, show objects at the
# scale at which detection and segmentation will meet them. Pixels as the target, rather than normalised pixels: the
# pictures come sooner, and nothing of the hidden patches has to be put back to show them.
_PRETRAIN = ("model.norm_pix_loss=false", "data.crop_scale=[0.2,1.0]", "log.evaluate_every_epochs=5")
# Crops and flips only: so short a training gains nothing from stronger augmentation.
_CLASSIFY = ("augment.kind=crop", "data.crop_scale=[0.35,1.0]", "model.drop_path=0", "log.evaluate_every_epochs=2")
_ANCHORS = "model.anchor_sizes=[8,16,32,64,128]"
FULL = DemoSize(
    unlabelled=640,
    train=160,
    val=40,
    # Small batches and a high rate (5e-4 for a batch of 32), since there is time for few steps.
    pretrain=("train.batch_size=32", "optim.base_lr=4.0e-3", "optim.warmup_epochs=3", *_PRETRAIN),
    detection=("train.batch_size=2", "train.log_period=10", _ANCHORS, "optimizer.lr=1e-3", "schedule.warmup_iters=40"),
    segmentation=("train.batch_size=4", "train.log_interval=10"),
    pretrain_steps=850,
    detection_iters=400,
    classification=("train.batch_size=32", "optim.base_lr=8.0e-3", "optim.warmup_epochs=0.5", *_CLASSIFY),
    segmentation_iters=160,
    classification_steps=120,
    seconds=(25, 165, 95, 70, 60),
)
SMOKE = DemoSize(
    side=64,
    unlabelled=16,
    train=4,
    val=4,
    pretrain=("train.batch_size=8", "optim.warmup_epochs=1", *_PRETRAIN, "log.every_steps=1"),
    detection=("train.batch_size=2", "train.log_period=1", _ANCHORS, "schedule.warmup_iters=1"),
    segmentation=("train.batch_size=2", "train.log_interval=1"),
    pretrain_steps=4,
    detection_iters=3,
    classification=("train.batch_size=4", "optim.warmup_epochs=0.1", *_CLASSIFY, "log.every_steps=1"),
    segmentation_iters=3,
    classification_steps=3,
    seconds=(8, 12, 25, 20, 12),
)
SIZES = {"full": FULL, "smoke": SMOKE}
STARTS = {"pretrained": "pretrained encoder", "random": "random weights"}


def no_progress() -> float:
    """For stages that do not tell how far they are."""
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command of the demo.

    name: of its record and its log. title: for people. command: after `python`. product: exists when it is done.
    seconds: expected. started: exists once there is something to continue. resume: what the command then gets.
    progress: parts of 1 done, read from what the tool writes.
    """

    name: str
    title: str
    command: tuple[str, ...]
    product: Path
    seconds: float
    started: Path | None = None
    resume: tuple[str, ...] = ()
    progress: Callable[[], float] = no_progress


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things lie below the demo's output folder."""

    out: Path

    @property
    def scenes(self) -> Path:
        return self.out / "scenes"

    @property
    def pretraining(self) -> Path:
        return self.out / "pretrain"

    @property
    def encoder(self) -> Path:
        return self.out / "encoder.safetensors"

    @property
    def reconstructions(self) -> Path:
        return self.out / "reconstructions.png"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    def detection(self, start: str) -> Path:
        return self.out / f"detection-{start}"

    def segmentation(self, start: str) -> Path:
        return self.out / f"segmentation-{start}"

    def classification(self, start: str) -> Path:
        return self.out / f"classification-{start}"

    def record(self, stage: str) -> Path:
        return self.out / "stages" / f"{stage}.json"

    def log(self, stage: str) -> Path:
        return self.out / "logs" / f"{stage}.txt"


def last_value(files: Sequence[Path], key: str) -> float:
    """The value of `key` in the last JSON line that has it, over files in the order of their names; 0 if none has."""
    for path in sorted(files, reverse=True):
        for line in reversed(path.read_text(encoding="utf-8").splitlines()):
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that is being written at this moment
            if key in content:
                return float(content[key])
    return 0.0


def stages(layout: Layout, size: DemoSize) -> list[Stage]:
    """The demo's commands; paths in them are as short as they can be said from the checkout."""

    def say(path: Path) -> str:
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    coco, side = layout.scenes / "coco", size.side
    scene_seconds, pretrain_seconds, detection_seconds, segmentation_seconds, classification_seconds = size.seconds
    counts = ("--unlabelled", str(size.unlabelled), "--train", str(size.train), "--val", str(size.val))
    result = [
        Stage(
            name="scenes",
            title="composing scenes",
            command=("tools/make_scenes.py", "--out", say(layout.scenes), "--size", str(side), *counts),
            product=layout.scenes,
            seconds=scene_seconds,
        ),
        Stage(
            name="pretrain",
            title="pretraining",
            command=(
                *("tools/pretrain.py", "configs/pretrain/tiny.yaml", f"data.path={say(layout.scenes / 'unlabelled')}"),
                *(f"data.val_path={say(coco / 'val')}", f"run.dir={say(layout.pretraining)}", "train.epochs=null"),
                *(f"train.steps={size.pretrain_steps}", *size.pretrain),
            ),
            product=layout.pretraining / "encoder.safetensors",
            seconds=pretrain_seconds,
            started=layout.pretraining,
            resume=("run.resume=auto",),
            progress=lambda: last_value([*layout.pretraining.glob("metrics.jsonl")], "step") / size.pretrain_steps,
        ),
        Stage(
            name="reconstruct",
            title="reconstructing unseen scenes",
            command=(
                *("tools/reconstruct.py", say(layout.pretraining / "model.safetensors")),
                *(say(coco / "val" / f"val_{index:05d}.jpg") for index in range(min(4, size.val))),
                *("--out", say(layout.reconstructions)),
            ),
            product=layout.reconstructions,
            seconds=8,
        ),
        Stage(
            name="convert",
            title="taking the encoder out",
            command=(
                *("tools/convert_checkpoint.py", say(layout.pretraining / "model.safetensors")),
                *(say(layout.encoder), "--to", "backbone"),
            ),
            product=layout.encoder,
            seconds=5,
        ),
    ]
    for start in STARTS:
        folder = layout.detection(start)
        encoder = f"train.init_checkpoint={say(layout.encoder)}" if start == "pretrained" else "model.patch_size=8"
        result.append(
            Stage(
                name=f"detection-{start}",
                title=f"Mask R-CNN from {STARTS[start]}",
                command=(
                    *("tools/train_det.py", "--config-file", "configs/detection/tiny.py"),
                    f"dataset.train.json={say(coco / 'annotations' / 'instances_train.json')}",
                    f"dataset.train.images={say(coco / 'train')}",
                    f"dataset.val.json={say(coco / 'annotations' / 'instances_val.json')}",
                    f"dataset.val.images={say(coco / 'val')}",
                    *(f"dataset.image_size={side}", encoder, f"train.max_iter={size.detection_iters}"),
                    *(*size.detection, f"train.output_dir={say(folder)}"),
                ),
                product=folder / "evaluation.json",
                seconds=detection_seconds,
                started=folder,
                resume=("--resume",),
                progress=lambda folder=folder: (  # type: ignore[misc]
                    0.85 * last_value([*folder.glob("metrics.json")], "iteration") / size.detection_iters
                ),
            )
        )
    for start in STARTS:
        folder = layout.segmentation(start)
        encoder = f"init_checkpoint={say(layout.encoder)}" if start == "pretrained" else "encoder.patch_size=8"
        result.append(
            Stage(
                name=f"segmentation-{start}",
                title=f"UperNet from {STARTS[start]}",
                command=(
                    *("tools/train_seg.py", "configs/segmentation/upernet_tiny.py", "--work-dir", say(folder)),
                    *("--cfg-options", f"dataset.root={say(layout.scenes / 'ade')}", f"dataset.crop_size={side}"),
                    *(encoder, f"train.max_iters={size.segmentation_iters}"),
                    *(f"train.val_interval={size.segmentation_iters}", *size.segmentation),
                ),
                product=folder / "last_checkpoint",
                seconds=segmentation_seconds,
                started=folder,
                resume=("--resume",),
                progress=lambda folder=folder: (  # type: ignore[misc]
                    0.85 * last_value([*folder.glob("*/vis_data/scalars.json")], "iter") / size.segmentation_iters
                ),
            )
        )
    for start in STARTS:
        folder = layout.classification(start)
        encoder = f"init_checkpoint={say(layout.encoder)}" if start == "pretrained" else "model.patch_size=8"
        result.append(
            Stage(
                name=f"classification-{start}",
                title=f"fine-tuning from {STARTS[start]}",
                command=(
                    *("tools/train_cls.py", "configs/classification/tiny_finetune.yaml"),
                    *(f"data.{split}={say(layout.scenes / 'classes' / split)}" for split in ("train", "val")),
                    *(encoder, "train.epochs=null", f"train.steps={size.classification_steps}"),
                    *(*size.classification, f"run.dir={say(folder)}"),
                ),
                product=folder / "model.safetensors",
                seconds=classification_seconds,
                started=folder,
                resume=("run.resume=auto",),
                progress=lambda folder=folder: (  # type: ignore[misc]
                    last_value([*folder.glob("metrics.jsonl")], "step") / size.classification_steps
                ),
            )
        )
    return result


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is remembered of a stage: its command, the seconds spent on it in all attempts, and whether it finished."""

    command: tuple[str, ...]
    seconds: float = 0.0
    finished: bool = False


def shown(command: Sequence[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(["python", *command])
