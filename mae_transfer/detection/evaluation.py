"""COCO box and mask AP of a detector, against the json's own ids."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from faster_coco_eval import COCO, COCOeval_faster

from mae_transfer.detection.dataset import CocoDataset
from mae_transfer.engine.files import write_text

logger = logging.getLogger(__name__)

_AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}


def to_coco_results(instances: Any, image_id: int, dataset_categories: list[int]) -> list[dict[str, Any]]:
    """Detections as entries of a COCO result file, with the json's category ids."""
    results = instances_to_coco_json(instances.to("cpu"), image_id)
    for result in results:
        result["category_id"] = dataset_categories[result["category_id"]]
    return results


class CocoEvaluator(DatasetEvaluator):
    """Collects detections in all processes and scores them in the first.

    Args:
        max_dets: detections an image that count; COCO's own evaluation has 100, scenes with hundreds of instances
            need more.
        output_dir: receives ``coco_instances_results.json``.
    """

    def __init__(self, dataset: CocoDataset, *, max_dets: int, output_dir: Path) -> None:
        self.dataset = dataset
        self.max_dets = max_dets
        self.output_dir = output_dir
        self._category_ids = [category.id for category in dataset.categories]
        self._results: list[dict[str, Any]] = []

    def reset(self) -> None:
        self._results = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs):
            self._results += to_coco_results(output["instances"], image["image_id"], self._category_ids)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"bbox": {"AP", "AP50", …}, "segm": {…}} in per cent; empty in all processes but the first."""
        comm.synchronize()
        gathered = comm.gather(self._results, dst=0)
        if not comm.is_main_process():
            return {}
        results = list(itertools.chain.from_iterable(gathered))
        write_text(self.output_dir / "coco_instances_results.json", json.dumps(results))
        return {kind: score(self.dataset, results, kind, max_dets=self.max_dets) for kind in ("bbox", "segm")}


def score(dataset: CocoDataset, results: list[dict[str, Any]], kind: str, *, max_dets: int) -> dict[str, float]:
    """COCO's average precision of a result list.

    Args:
        kind: "bbox" or "segm".
        max_dets: detections an image that count.

    Returns:
        AP (IoU .5 to .95), AP50, AP75, APs, APm, APl, AR and, with several categories, one "AP-name" each, in
        per cent. NaN where there is no ground truth to compute it from.
    """
    # Scores of masks need areas of masks: a result entry with a box would be given the box's.
    entries = [{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in results]
    truth = COCO(_complete(dataset.json_dict))
    evaluation = COCOeval_faster(truth, truth.loadRes(entries), kind, print_function=logger.debug)
    evaluation.params.maxDets = [1, 10, max_dets]
    evaluation.params.catIds = [category.id for category in dataset.categories]
    evaluation.evaluate()
    evaluation.accumulate()
    # (IoU threshold, recall, category, area, limit); -1 where a category has no ground truth.
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    recall = np.asarray(evaluation.eval["recall"])[..., -1]
    areas = evaluation.params.areaRngLbl
    thresholds = evaluation.params.iouThrs
    scores = {f"AP{letter}": _mean(precision[:, :, :, areas.index(area)]) for letter, area in _AREAS.items()}
    for percent in (50, 75):
        at = int(np.argmin(np.abs(thresholds - percent / 100)))
        scores[f"AP{percent}"] = _mean(precision[at, :, :, 0])
    scores["AR"] = _mean(recall[:, :, 0])
    if len(dataset.categories) > 1:
        for number, category in enumerate(dataset.categories):
            scores[f"AP-{category.name}"] = _mean(precision[:, :, number, 0])
    return scores


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")


def _complete(json_dict: dict[str, Any]) -> dict[str, Any]:
    """Annotations with the fields that the evaluation reads and files sometimes lack."""
    annotations = [
        {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3], **annotation}
        for annotation in json_dict["annotations"]
    ]
    return {**json_dict, "annotations": annotations}


def describe(scores: dict[str, dict[str, float]], *, num_images: int, max_dets: int) -> str:
    """One line a person can read."""
    parts = [
        f"{name} AP {scores[kind]['AP']:.2f} (AP50 {scores[kind]['AP50']:.2f}, AP75 {scores[kind]['AP75']:.2f})"
        for kind, name in (("bbox", "box"), ("segm", "mask"))
        if kind in scores
    ]
    return f"{'; '.join(parts)} on {num_images} images, at most {max_dets} detections an image"
