"""Box and mask AP of a detector as COCO and LVIS define it, against the json's own ids."""

from __future__ import annotations

import gc
import itertools
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from faster_coco_eval import COCO, COCOeval_faster

from mae_transfer.detection.dataset import CocoDataset
from mae_transfer.engine.files import write_text

logger = logging.getLogger(__name__)

FREQUENCIES = ("r", "c", "f")  # of a category in LVIS: rare, common, frequent
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
    """The average precision of a result list: COCO's, or LVIS's where the data set is federated.

    Equal to pycocotools but for the last of 16 digits (it adds 2e-16 to what it divides by). Its quirks with annotation
    ids are not followed: it keeps one annotation an id, and counts one with the id 0 as never found.

    Args:
        kind: "bbox" or "segm".
        max_dets: detections an image that count; of each category, or in LVIS of all of them together.

    Returns:
        In per cent: AP (IoU .5 to .95), AP50, AP75, APs, APm, APl; the average recall AR1, AR10 and AR of 1, 10 and
        ``max_dets`` detections, ARs, ARm, ARl; in LVIS APr, APc, APf of the categories that the json calls rare, common
        and frequent; with several categories one "AP-name" each. NaN where there is no ground truth to compute it from.
    """
    federated = dataset.federated
    numbers = {image_id: number for number, image_id in enumerate(_in_order(dataset.json_dict["images"]), start=1)}
    if federated:
        results = _best_of_each_image(results, max_dets)
    truth = _as_coco(dataset, numbers, _truth(dataset, numbers, kind))
    found = _as_coco(dataset, numbers, _detections(results, numbers, kind))
    threads = torch.get_num_threads()
    evaluation = COCOeval_faster(
        truth, found, kind, print_function=logger.debug, lvis_style=federated, rle_iou_max_workers=threads
    )
    limits = sorted({min(limit, max_dets) for limit in (1, 10, max_dets)})
    evaluation.params.maxDets = [max_dets] if federated else limits
    evaluation.params.catIds = [category.id for category in dataset.categories]
    with _no_garbage_collection():
        evaluation.evaluate()
        evaluation.accumulate()
    # precision (IoU threshold, recall, category, area, limit), recall without the second; -1 without ground truth.
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    recall = np.asarray(evaluation.eval["recall"])
    areas = evaluation.params.areaRngLbl
    thresholds = evaluation.params.iouThrs
    scores = {f"AP{letter}": _mean(precision[:, :, :, areas.index(area)]) for letter, area in _AREAS.items()}
    for percent in (50, 75):
        at = int(np.argmin(np.abs(thresholds - percent / 100)))
        scores[f"AP{percent}"] = _mean(precision[at, :, :, 0])
    scores |= {f"AR{letter}": _mean(recall[:, :, areas.index(area), -1]) for letter, area in _AREAS.items()}
    if federated:
        frequencies = np.array(_frequencies(dataset))
        scores |= {f"AP{letter}": _mean(precision[:, :, frequencies == letter, 0]) for letter in FREQUENCIES}
    else:
        scores |= {f"AR{limit}": _mean(recall[:, :, 0, limits.index(limit)]) for limit in limits if limit in (1, 10)}
    if len(dataset.categories) > 1:
        for number, name in enumerate(_distinct_names(dataset)):
            scores[f"AP-{name}"] = _mean(precision[:, :, number, 0])
    return scores


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A list is made for each image and category, none of them garbage; looking for some takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else float("nan")


def _distinct_names(dataset: CocoDataset) -> list[str]:
    """Names of the categories, with their id where two share one."""
    counts = Counter(dataset.names)
    return [c.name if counts[c.name] == 1 else f"{c.name} ({c.id})" for c in dataset.categories]


def _in_order(images: list[dict[str, Any]]) -> list[Any]:
    """Image ids in the order that decides between detections of one score: numbers first, as numbers."""
    return sorted((image["id"] for image in images), key=lambda number: (isinstance(number, str), number))


def _frequencies(dataset: CocoDataset) -> list[str]:
    """The letter of each category; one that the json does not give counts as none of FREQUENCIES."""
    given = {entry["id"]: entry.get("frequency", "") for entry in dataset.json_dict["categories"]}
    return [given.get(category.id, "") for category in dataset.categories]


def _as_coco(dataset: CocoDataset, numbers: dict[Any, int], annotations: list[dict[str, Any]]) -> COCO:
    images = [{**image, "id": numbers[image["id"]]} for image in dataset.json_dict["images"]]
    # The evaluation sorts categories into its own three groups, which are not looked at: they have to be valid only.
    categories = [{"id": c.id, "name": c.name, "frequency": FREQUENCIES[0]} for c in dataset.categories]
    return COCO({"images": images, "annotations": annotations, "categories": categories})


def _truth(dataset: CocoDataset, numbers: dict[Any, int], kind: str) -> list[dict[str, Any]]:
    """Annotations under ids of their own, with the fields that the evaluation reads and files sometimes lack."""
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in dataset.json_dict["images"]}
    return [
        {
            "id": number,
            "image_id": numbers[a["image_id"]],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "area": area if isinstance(area := a.get("area"), (int, float)) else _area(a, sizes[a["image_id"]]),
            "iscrowd": int(a.get("iscrowd", 0)),
            **({"segmentation": a["segmentation"]} if kind == "segm" else {}),
        }
        for number, a in enumerate(dataset.json_dict["annotations"], start=1)
    ]


def _area(annotation: dict[str, Any], size: tuple[int, int]) -> float:
    """Pixels within an outline: what COCO's own files have as area."""
    outline = annotation["segmentation"]
    if isinstance(outline, list):
        outline = mask_util.merge(mask_util.frPyObjects(outline, *size))
    elif isinstance(outline["counts"], list):
        outline = mask_util.frPyObjects(outline, *size)
    return float(mask_util.area(outline))


def _detections(results: list[dict[str, Any]], numbers: dict[Any, int], kind: str) -> list[dict[str, Any]]:
    """Results with an id and their area; a mask's is that of the mask, not of the box that came with it."""
    if kind == "segm":
        masks = [result["segmentation"] for result in results]
        # pycocotools counts the masks of a call in eight bits.
        areas = [area for start in range(0, len(masks), 255) for area in mask_util.area(masks[start : start + 255])]
    else:
        areas = [r["bbox"][2] * r["bbox"][3] for r in results]
    field = "segmentation" if kind == "segm" else "bbox"
    return [
        {
            "id": number,
            "image_id": numbers[result["image_id"]],
            "category_id": result["category_id"],
            "score": result["score"],
            field: result[field],
            "area": float(area),
            "iscrowd": 0,
        }
        for number, (result, area) in enumerate(zip(results, areas), start=1)
    ]


def _best_of_each_image(results: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """LVIS counts the best detections of an image whatever their category; of equal scores the first."""
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return [
        result
        for of_image in by_image.values()
        for result in sorted(of_image, key=lambda result: -result["score"])[:limit]
    ]


def describe(scores: dict[str, dict[str, float]], *, num_images: int, max_dets: int) -> str:
    """One line a person can read."""
    parts = [
        f"{name} AP {scores[kind]['AP']:.2f} (AP50 {scores[kind]['AP50']:.2f}, AP75 {scores[kind]['AP75']:.2f})"
        for kind, name in (("bbox", "box"), ("segm", "mask"))
        if kind in scores
    ]
    return f"{'; '.join(parts)} on {num_images} images, at most {max_dets} detections an image"
