"""A training put together: initial weights, optimizer, data, and what happens around the steps."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.config import instantiate
from detectron2.engine import HookBase, create_ddp_model, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, TensorboardXWriter
from omegaconf import DictConfig

from mae_transfer.checkpoint.detectors import load_initial
from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.config import build_augmentation, save_config
from mae_transfer.detection.dataset import CocoDataset
from mae_transfer.detection.hooks import (
    Evaluate,
    FollowSchedule,
    KeepBest,
    RecordMetrics,
    SaveCheckpoints,
    StopOnDivergence,
)
from mae_transfer.detection.loader import build_train_loader
from mae_transfer.detection.settings import describe
from mae_transfer.detection.trainer import Trainer
from mae_transfer.detection.validation import evaluate
from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import ConfigError
from mae_transfer.layer_decay import freeze_blocks

logger = logging.getLogger(__name__)


def train_detector(
    cfg: DictConfig,
    model: GeneralizedRCNN,
    checkpointer: StrictCheckpointer,
    train_set: CocoDataset,
    val: CocoDataset | None,
    resume: bool,
) -> None:
    """Train to the end, from the start or from the last checkpoint; every process calls it.

    Raises:
        UserError: weights or a checkpoint that do not fit; data that turns out to be unreadable.
        RunFailed: the loss has diverged, or the disk is full.
        SystemExit: with status 75, after a stop signal, the state saved.
    """
    train, max_iter = cfg.train, cfg.schedule.max_iter
    logger.info(describe(cfg, num_images=len(train_set.records), num_processes=comm.get_world_size()))
    last = checkpointer.last_good() if resume and checkpointer.has_checkpoint() else None
    if last is None:
        if resume:
            logger.info("Nothing to resume in %s; starting at iteration 0", train.output_dir)
        _load_initial_weights(cfg, model)
    if model.device.type == "cpu":
        keep_freed_memory()
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
    else:
        logger.info("%s", load_initial(model, source))


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
