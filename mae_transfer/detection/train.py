"""Train and evaluate Mask R-CNN on an MAE encoder: what ``tools/train_det.py`` runs."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import create_ddp_model, default_writers, hooks, launch
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import GeneralizedRCNN
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from omegaconf import DictConfig

from mae_transfer.checkpoint import load_backbone
from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.config import build_augmentation, categories_of, load_config, resolve, save_config
from mae_transfer.detection.dataset import CocoDataset, load_coco
from mae_transfer.detection.evaluation import CocoEvaluator, describe
from mae_transfer.detection.loader import build_test_loader, build_train_loader, read_rgb
from mae_transfer.detection.log import log_to
from mae_transfer.detection.trainer import SaveOnSignal, Trainer
from mae_transfer.detection.visualize import draw_ground_truth, draw_predictions, save_image, side_by_side
from mae_transfer.engine.files import write_text
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_EPILOG = """\
keys most runs set (any key of the config file, and any argument of what it calls, can be set the same way):
  dataset.train.json=FILE dataset.train.images=FOLDER   what to learn from, in COCO format
  dataset.val.json=FILE dataset.val.images=FOLDER       what to evaluate on; left out: no evaluation
  dataset.image_size=N dataset.resize=jitter|native     side of the training square; resize to it, or crop it
  train.init_checkpoint=FILE                            an MAE encoder; left out: random weights
  train.max_iter=N train.batch_size=N train.output_dir=FOLDER train.seed=N optimizer.lr=X
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
    parser.add_argument("--eval-only", action="store_true", help="evaluate the last checkpoint in train.output_dir")
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
    _check_output_folder(cfg, args)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, train_set, val, args.resume),
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
        train_set = load_coco(dataset.train.json, dataset.train.images, categories=categories).with_instances()
        train_set = train_set.part(dataset.train.get("fraction", 1.0), seed=dataset.train.get("fraction_seed", 0))
    return train_set, val


def run(cfg: DictConfig, train_set: CocoDataset | None, val: CocoDataset | None, resume: bool) -> None:
    """One process of a run; ``cfg`` is resolved. Without a training set the last checkpoint is evaluated."""
    output_dir = Path(cfg.train.output_dir)
    with log_to(output_dir, comm.get_rank()):
        torch.manual_seed(cfg.train.seed)
        model = instantiate(cfg.model).to(choose_device(cfg))
        checkpointer = StrictCheckpointer(model, str(output_dir))
        if train_set is None:
            assert val is not None
            _evaluate_last(cfg, model, checkpointer, val)
            return
        if comm.is_main_process():
            save_config(cfg, output_dir / "config.yaml")
        _train(cfg, model, checkpointer, train_set, val, resume)


def _evaluate_last(cfg: DictConfig, model: GeneralizedRCNN, checkpointer: StrictCheckpointer, val: CocoDataset) -> None:
    if not checkpointer.has_checkpoint():
        raise CheckpointError(f"train.output_dir={cfg.train.output_dir} holds no checkpoint to evaluate")
    state = checkpointer.load(checkpointer.get_checkpoint_file(), checkpointables=[])
    evaluate(cfg, model, val, state["iteration"] + 1)


def _train(
    cfg: DictConfig,
    model: GeneralizedRCNN,
    checkpointer: StrictCheckpointer,
    train_set: CocoDataset,
    val: CocoDataset | None,
    resume: bool,
) -> None:
    output_dir = Path(cfg.train.output_dir)
    start_fresh = not (resume and checkpointer.has_checkpoint())
    if start_fresh:
        if resume:
            logger.info("Nothing to resume in %s; starting at iteration 0", output_dir)
        if cfg.train.init_checkpoint:
            logger.info("Encoder from %s", load_backbone(model.backbone.net, cfg.train.init_checkpoint))
        else:
            logger.info("train.init_checkpoint is not given: the encoder starts from random weights")
    optimizer = instantiate({**cfg.optimizer, "model": model})
    logger.info("Weight decay rule: %s", cfg.optimizer.get("decay_rule", "clean"))
    scheduler = LRMultiplier(optimizer, instantiate(cfg.schedule), cfg.train.max_iter)
    precision = Precision(cfg.train.precision, model.device)
    device_ids = [comm.get_local_rank()] if model.device.type == "cuda" else None
    trainer = Trainer(
        create_ddp_model(model, device_ids=device_ids, broadcast_buffers=False),
        [],
        optimizer,
        precision=precision,
        seed=cfg.train.seed,
        clip_norm=cfg.train.clip_norm,
    )
    checkpointer.add_checkpointable("trainer", trainer)

    def evaluate_now() -> dict[str, Any]:
        return evaluate(cfg, model, val, trainer.iter + (trainer.iter < cfg.train.max_iter)) if val else {}

    main_process = comm.is_main_process()
    stop = StopRequest()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=scheduler),
            hooks.PeriodicCheckpointer(
                checkpointer, cfg.train.checkpoint_period, max_iter=cfg.train.max_iter, max_to_keep=cfg.train.keep
            )
            if main_process
            else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate_now),
            SaveOnSignal(stop, checkpointer),  # before the writers: Detectron2's cannot write an iteration twice
            hooks.PeriodicWriter(default_writers(str(output_dir), cfg.train.max_iter), period=cfg.train.log_period)
            if main_process
            else None,
        ]
    )
    start = 0
    if not start_fresh:
        checkpointer.load(checkpointer.get_checkpoint_file())
        start = trainer.iter + 1
        logger.info("Resuming at iteration %d", start)
    trainer.data_loader = build_train_loader(
        train_set,
        build_augmentation(cfg),
        batch_size=cfg.train.batch_size,
        seed=cfg.train.seed,
        start_iter=start,
        max_iter=cfg.train.max_iter,
        num_workers=cfg.dataset.workers,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    with stop:
        trainer.train(start, cfg.train.max_iter)


def evaluate(cfg: DictConfig, model: GeneralizedRCNN, val: CocoDataset, iteration: int) -> dict[str, Any]:
    """Box and mask AP on ``val``, written to ``evaluation.json``, and pictures of the first images.

    Runs in fp32: boxes and scores are read to more digits than bf16 has.
    """
    output_dir = Path(cfg.train.output_dir)
    max_dets = model.roi_heads.box_predictor.test_topk_per_image
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
        save_pictures(cfg, model, val)
    model.train(was_training)
    return scores


@torch.no_grad()
def save_pictures(cfg: DictConfig, model: GeneralizedRCNN, val: CocoDataset) -> None:
    """Ground truth (left) and prediction (right) of the first images, to ``predictions/``."""
    model.eval()
    loader = build_test_loader(val, build_augmentation(cfg), num_workers=0)
    folder = Path(cfg.train.output_dir) / "predictions"
    for number, batch in enumerate(loader):
        if number == cfg.train.pictures:
            break
        record = batch[0]
        image = read_rgb(record)
        truth = draw_ground_truth(image, record, val.names)
        predicted = draw_predictions(image, model(batch)[0]["instances"], val.names, min_score=cfg.train.picture_score)
        name = Path(record["file_name"]).stem
        save_image(side_by_side(truth, predicted), folder / f"{name}.png")


def choose_device(cfg: DictConfig) -> torch.device:
    if cfg.train.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(cfg.train.device)
    except RuntimeError as error:
        raise ConfigError(f"train.device={cfg.train.device}: expected auto, cpu or cuda") from error


def _check_processes(cfg: DictConfig, args: argparse.Namespace) -> None:
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines count processes and machines; both are at least 1")
    processes = args.num_gpus * args.num_machines
    if cfg.train.batch_size % processes:
        raise ConfigError(
            f"train.batch_size={cfg.train.batch_size} (global) does not divide among {processes} processes"
        )
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}")
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
    unborn = "log.txt" in names and names <= {"log.txt", "config.yaml"}
    if names and not unborn and not args.resume and not args.eval_only:
        raise ConfigError(
            f"train.output_dir={folder} is not empty; choose another folder, or go on with what it holds by --resume"
        )
    folder.mkdir(parents=True, exist_ok=True)
