"""Train and evaluate Mask R-CNN on an MAE encoder: what ``tools/train_det.py`` runs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.utils import comm
from omegaconf import DictConfig

from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.config import categories_of, load_config, resolve
from mae_transfer.detection.dataset import CocoDataset, load_coco
from mae_transfer.detection.log import log_to
from mae_transfer.detection.processes import launch_processes
from mae_transfer.detection.settings import settle_length
from mae_transfer.detection.training import train_detector
from mae_transfer.detection.validation import evaluate_last
from mae_transfer.engine.hardware import named_device
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.run_folder import RunFolder, describe_environment
from mae_transfer.errors import ConfigError

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
            evaluate_last(cfg, model, checkpointer, val)
            return
        train_detector(cfg, model, checkpointer, train_set, val, resume)


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
