"""Train and evaluate Mask R-CNN on an MAE encoder: what ``tools/train_det.py`` runs."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, create_ddp_model, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, TensorboardXWriter
from omegaconf import DictConfig

from mae_transfer.checkpoint import load_backbone
from mae_transfer.checkpoint.detectors import is_detector, load_detector
from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.config import build_augmentation, categories_of, load_config, resolve, save_config
from mae_transfer.detection.dataset import CocoDataset, load_coco
from mae_transfer.detection.evaluation import CocoEvaluator, describe
from mae_transfer.detection.hooks import (
    Evaluate,
    FollowSchedule,
    KeepBest,
    RecordMetrics,
    SaveCheckpoints,
    StopOnDivergence,
)
from mae_transfer.detection.loader import build_test_loader, build_train_loader, read_rgb
from mae_transfer.detection.log import log_to
from mae_transfer.detection.model import detections_per_image
from mae_transfer.detection.processes import launch_processes
from mae_transfer.detection.settings import describe as describe_run
from mae_transfer.detection.settings import named_device, settle_length
from mae_transfer.detection.trainer import Trainer
from mae_transfer.detection.visualize import (
    draw_ground_truth,
    draw_predictions,
    readable_scale,
    save_image,
    side_by_side,
)
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.files import write_text
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.run_folder import RunFolder, describe_environment
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.layer_decay import freeze_blocks

logger = logging.getLogger(__name__)

_EPILOG = """\
keys most runs set (any key of the config file, and any argument of what it calls, can be set the same way):
  dataset.train.json=FILE dataset.train.images=FOLDER   what to learn from, in COCO format
  dataset.val.json=FILE dataset.val.images=FOLDER       what to evaluate on; left out: no evaluation
  dataset.train.name=coco_2017_train dataset.val.name=… known data sets below DETECTRON2_DATASETS, instead of the files
  dataset.image_size=N dataset.resize=jitter|native     side of the training square; resize to it, or crop it
  train.init_checkpoint=FILE                            an MAE encoder; left out: random weights
  train.max_iter=N (or train.epochs=X) train.batch_size=N train.output_dir=FOLDER train.seed=N optimizer.lr=X
  train.accumulate=N train.precision=fp32|bf16|fp16 train.eval_period=N train.ema=0.9999 train.freeze_blocks=N
  model.size=NAME model.patch_size=N model.anchor_sizes=[a,b,c,d,e] model.detections_per_image=N
"""


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's flags."""
    parser = argparse.ArgumentParser(
        prog="train_det.py",
        description="Train Mask R-CNN in Detectron2 on a Vision Transformer, from an MAE encoder or random weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a LazyConfig, see configs/detection/")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in train.output_dir")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the last checkpoint in train.output_dir or, without one, the detector train.init_checkpoint",
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine (GPUs, or CPU)")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="where processes meet, such as tcp://host:port"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config, see below")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check everything that can be checked, and run; returns the exit status.

    Raises:
        UserError: bad input, before anything is written.
    """
    args = build_parser().parse_intermixed_args(argv)
    cfg = resolve(load_config(args.config_file, args.overrides), training=not args.eval_only)
    _check_processes(cfg, args)
    Precision(cfg.train.precision, choose_device(cfg))
    train_set, val = load_data(cfg, training=not args.eval_only)
    if train_set is not None:
        settle_length(cfg, len(train_set.records))
    _check_output_folder(cfg, args)
    launch_processes(
        run,
        (cfg, train_set, val, args.resume),
        per_machine=args.num_gpus,
        machines=args.num_machines,
        machine=args.machine_rank,
        url=args.dist_url,
    )
    return 0


def load_data(cfg: DictConfig, *, training: bool) -> tuple[CocoDataset | None, CocoDataset | None]:
    """The training set (None when only evaluating) and the validation set (None when none is named)."""
    categories, dataset = categories_of(cfg), cfg.dataset
    train_set = val = None
    if dataset.val.json:
        val = load_coco(dataset.val.json, dataset.val.images, categories=categories)
        if dataset.val.max_size is not None:
            val = val.at_most(dataset.val.max_size)
    if training:
        train_set = load_coco(dataset.train.json, dataset.train.images, categories=categories)
        if not dataset.train.get("keep_empty", False):
            train_set = train_set.with_instances()
        train_set = train_set.part(dataset.train.get("fraction", 1.0), seed=dataset.train.get("fraction_seed", 0))
    return train_set, val


def run(cfg: DictConfig, train_set: CocoDataset | None, val: CocoDataset | None, resume: bool) -> None:
    """One process of a run; ``cfg`` is resolved. Without a training set the last checkpoint is evaluated."""
    output_dir = Path(cfg.train.output_dir)
    alone = comm.is_main_process() and train_set is not None
    in_use = RunFolder(output_dir, key="train.output_dir").in_use() if alone else nullcontext()
    with in_use, log_to(output_dir, comm.get_rank()):
        logger.info("Environment:\n%s", describe_environment())
        torch.manual_seed(cfg.train.seed)
        model = instantiate(cfg.model).to(choose_device(cfg))
        checkpointer = StrictCheckpointer(model, str(output_dir))
        if train_set is None:
            assert val is not None
            _evaluate_last(cfg, model, checkpointer, val)
            return
        _train(cfg, model, checkpointer, train_set, val, resume)


def _evaluate_last(cfg: DictConfig, model: GeneralizedRCNN, checkpointer: StrictCheckpointer, val: CocoDataset) -> None:
    if not checkpointer.has_checkpoint():
        _evaluate_given(cfg, model, val)
        return
    state = checkpointer.load_for_inference(checkpointer.last_good())
    evaluate(cfg, model, val, state["iteration"] + 1)


def _evaluate_given(cfg: DictConfig, model: GeneralizedRCNN, val: CocoDataset) -> None:
    """Evaluate the whole detector of train.init_checkpoint, such as one of ViTDet's releases."""
    source = cfg.train.init_checkpoint
    if not source or not is_detector(source):
        raise CheckpointError(
            f"train.output_dir={cfg.train.output_dir} holds no checkpoint to evaluate, and train.init_checkpoint="
            f"{source} names no whole detector"
        )
    report = load_detector(model, source)
    if report.other_categories:
        raise CheckpointError(
            f"{source} was trained for another number of categories than the {len(val.categories)} of {val.json_file}"
        )
    logger.info("Detector from %s", report)
    evaluate(cfg, model, val, iteration=0)


def _train(
    cfg: DictConfig,
    model: GeneralizedRCNN,
    checkpointer: StrictCheckpointer,
    train_set: CocoDataset,
    val: CocoDataset | None,
    resume: bool,
) -> None:
    train, max_iter = cfg.train, cfg.schedule.max_iter
    logger.info(describe_run(cfg, num_images=len(train_set.records), num_processes=comm.get_world_size()))
    last = checkpointer.last_good() if resume and checkpointer.has_checkpoint() else None
    if last is None:
        if resume:
            logger.info("Nothing to resume in %s; starting at iteration 0", train.output_dir)
        _load_initial_weights(cfg, model)
    trainer = _build_trainer(cfg, model, num_images=len(train_set.records))
    checkpointer.add_checkpointable("trainer", trainer)
    trainer.register_hooks(
        [
            FollowSchedule(trainer.optimizer, instantiate(cfg.schedule), max_iter),
            StopOnDivergence(train.divergence_factor) if train.divergence_factor else None,
        ]
    )
    start = 0
    if last is not None:
        checkpointer.load(last)  # its hooks' state goes to those registered so far
        start = trainer.iter + 1
        if start > max_iter:
            raise ConfigError(f"{last} has done {start} iterations, more than the {max_iter} of this run")
        logger.info("Resuming at iteration %d", start)
    if comm.is_main_process():
        save_config(cfg, Path(train.output_dir) / "config.yaml")
    trainer.data_loader = build_train_loader(
        train_set,
        build_augmentation(cfg),
        batch_size=train.batch_size,
        seed=train.seed,
        start_iter=start,
        max_iter=max_iter,
        num_workers=cfg.dataset.workers,
        accumulate=train.accumulate,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    with StopRequest() as stop:
        trainer.register_hooks(_hooks(cfg, trainer, checkpointer, val, stop, start=start))
        trainer.train(start, max_iter)


def _load_initial_weights(cfg: DictConfig, model: GeneralizedRCNN) -> None:
    source = cfg.train.init_checkpoint
    if not source:
        logger.info("train.init_checkpoint is not given: the encoder starts from random weights")
    elif is_detector(source):
        logger.info("The whole detector from %s", load_detector(model, source))
    else:
        logger.info("Encoder from %s", load_backbone(model.backbone.net, source))


def _build_trainer(cfg: DictConfig, model: GeneralizedRCNN, *, num_images: int) -> Trainer:
    train = cfg.train
    depth = model.backbone.net.depth
    if frozen := freeze_blocks(model, depth=depth, num_blocks=train.freeze_blocks):
        logger.info("train.freeze_blocks=%d of %d: %d tensors are not trained", train.freeze_blocks, depth, len(frozen))
    device_ids = [comm.get_local_rank()] if model.device.type == "cuda" else None
    return Trainer(
        create_ddp_model(model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True),
        [],
        instantiate({**cfg.optimizer, "model": model}),
        precision=Precision(train.precision, model.device),
        seed=train.seed,
        accumulate=train.accumulate,
        clip_norm=train.clip_norm,
        average=WeightAverage(model, train.ema) if train.ema is not None else None,
        facts={"train.batch_size": train.batch_size, "train.seed": train.seed, "number of images": num_images},
    )


def _hooks(
    cfg: DictConfig,
    trainer: Trainer,
    checkpointer: StrictCheckpointer,
    val: CocoDataset | None,
    stop: StopRequest,
    *,
    start: int,
) -> list[HookBase | None]:
    """What happens around the steps, in its order: a checkpoint implies the metrics up to it."""
    train, output_dir = cfg.train, Path(cfg.train.output_dir)
    record = writer = best = None
    if comm.is_main_process():
        record = RecordMetrics(output_dir / "metrics.json", start=start, period=train.log_period)
        if train.best is not None:
            best = KeepBest(checkpointer, train.best, output_dir / "metrics.json")
        writers = [
            CommonMetricPrinter(cfg.schedule.max_iter),
            TensorboardXWriter(str(output_dir), purge_step=start or None),
        ]
        writer = hooks.PeriodicWriter(writers, period=train.log_period)

    def evaluate_now(done: int) -> dict[str, float]:
        assert val is not None
        with trainer.averaged():
            scores = flatten_results_dict(evaluate(cfg, checkpointer.model, val, done))
            if best is not None:
                best.consider(scores, done)
        return scores

    return [
        Evaluate(evaluate_now, period=train.eval_period) if val else None,
        hooks.IterationTimer(),  # behind evaluation, which is no part of an iteration's time
        record,
        SaveCheckpoints(
            checkpointer,
            stop,
            period=train.checkpoint_period,
            keep=train.keep,
            before_save=record.flush if record else lambda: None,
        ),
        writer,  # last: Detectron2's printer cannot write an iteration twice
    ]


def evaluate(cfg: DictConfig, model: GeneralizedRCNN, val: CocoDataset, iteration: int) -> dict[str, Any]:
    """Box and mask AP on ``val`` after ``iteration`` iterations, written to ``evaluation.json``, and pictures of the
    first images in ``predictions/``, in a folder of their own when it is not the end of a run.

    Runs in fp32: boxes and scores are read to more digits than bf16 has.
    """
    output_dir = Path(cfg.train.output_dir)
    max_dets = detections_per_image(model)
    loader = build_test_loader(val, build_augmentation(cfg), num_workers=cfg.dataset.workers)
    evaluator = CocoEvaluator(val, max_dets=max_dets, output_dir=output_dir)
    start = time.perf_counter()
    was_training = model.training
    scores = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        summary = describe(scores, num_images=len(val.records), max_dets=max_dets)
        logger.info("Iteration %d: %s", iteration, summary)
        # What has no ground truth to be computed from (no large instance, say) is left out: JSON has no NaN.
        scores = {kind: {k: v for k, v in values.items() if not math.isnan(v)} for kind, values in scores.items()}
        result = {
            "iteration": iteration,
            "num_images": len(val.records),
            "max_dets": max_dets,
            "seconds": round(time.perf_counter() - start, 2),
            **scores,
        }
        write_text(output_dir / "evaluation.json", json.dumps(result, indent=1) + "\n")
        pictures = output_dir / "predictions"
        at_end = iteration == cfg.schedule.get("max_iter", iteration)
        save_pictures(cfg, model, val, pictures if at_end else pictures / f"iteration_{iteration:07d}")
    model.train(was_training)
    return scores


@torch.no_grad()
def save_pictures(cfg: DictConfig, model: GeneralizedRCNN, val: CocoDataset, folder: Path) -> None:
    """Ground truth (left) and prediction (right) of the first images."""
    model.eval()
    loader = build_test_loader(val, build_augmentation(cfg), num_workers=0)
    for number, batch in enumerate(loader):
        if number == cfg.train.pictures:
            break
        record = batch[0]
        image = read_rgb(record)
        instances, scale = model(batch)[0]["instances"], readable_scale(image)
        truth = draw_ground_truth(image, record, val.names, scale=scale)
        predicted = draw_predictions(image, instances, val.names, min_score=cfg.train.picture_score, scale=scale)
        name = Path(record["file_name"]).stem
        save_image(side_by_side(truth, predicted), folder / f"{name}.png")


def choose_device(cfg: DictConfig) -> torch.device:
    return named_device(cfg.train.device, "train.device")


def _check_processes(cfg: DictConfig, args: argparse.Namespace) -> None:
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines count processes and machines; both are at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank}: expected 0 to {args.num_machines - 1}, by --num-machines"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError("--num-machines: give --dist-url tcp://HOST:PORT of the first machine, on every machine")
    processes = args.num_gpus * args.num_machines
    unit = processes * cfg.train.accumulate
    if cfg.train.batch_size % unit:
        raise ConfigError(
            f"train.batch_size={cfg.train.batch_size} (global) does not divide among {processes} processes x "
            f"train.accumulate={cfg.train.accumulate}; use a multiple of {unit}"
        )
    device = choose_device(cfg)
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}")
    if processes > 1 and torch.cuda.is_available() and (device.type == "cpu" or device.index is not None):
        raise ConfigError(
            f"train.device={cfg.train.device}: several processes take a GPU each; leave it out, or hide the GPUs "
            "(CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    norm = cfg.model.get("norm")
    if norm == "SyncBN" and (processes == 1 or not torch.cuda.is_available()):
        # Over one process it is the same function, and torch's synchronised kernel exists for GPUs only.
        cfg.model.norm = "BN"


def _check_output_folder(cfg: DictConfig, args: argparse.Namespace) -> None:
    folder = Path(cfg.train.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.output_dir={folder} is a file; name a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # Only what a run leaves that was refused before its first iteration: an encoder that does not fit, say.
    unborn = "log.txt" in names and names <= {"log.txt", "config.yaml", ".in-use"}
    # The first machine decides: the others may come when it has begun.
    if names and not unborn and not args.resume and not args.eval_only and not args.machine_rank:
        raise ConfigError(
            f"train.output_dir={folder} is not empty; choose another folder, or go on with what it holds by --resume"
        )
    folder.mkdir(parents=True, exist_ok=True)
