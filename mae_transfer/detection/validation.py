"""Evaluation of a detector: scores in a file, pictures beside the ground truth."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from omegaconf import DictConfig

from mae_transfer.checkpoint.detectors import is_detector, load_detector
from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.config import build_augmentation
from mae_transfer.detection.dataset import CocoDataset
from mae_transfer.detection.evaluation import CocoEvaluator, describe
from mae_transfer.detection.loader import build_test_loader, read_rgb
from mae_transfer.detection.model import detections_per_image
from mae_transfer.detection.visualize import (
    draw_ground_truth,
    draw_predictions,
    readable_scale,
    save_image,
    side_by_side,
)
from mae_transfer.engine.files import write_text
from mae_transfer.errors import CheckpointError

logger = logging.getLogger(__name__)


def evaluate_last(cfg: DictConfig, model: GeneralizedRCNN, checkpointer: StrictCheckpointer, val: CocoDataset) -> None:
    """Evaluate a run's last checkpoint; where there is none, the detector of train.init_checkpoint.

    Raises:
        CheckpointError: neither is there, or it is of another model.
    """
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
