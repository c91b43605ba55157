"""AP as pycocotools computes it, on random detections with crowds, gaps in the ids and several hundreds an image."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mae_transfer.detection.dataset import CocoDataset, load_coco
from mae_transfer.detection.evaluation import CocoEvaluator, describe, score


@pytest.fixture
def dataset(make_scenes: Callable[..., Any]) -> CocoDataset:
    scenes = make_scenes(num_images=4, side=64, num_instances=7)
    scenes.content["annotations"][2]["iscrowd"] = 1
    scenes.write()
    return load_coco(scenes.json, scenes.images)


def noisy_detections(dataset: CocoDataset, per_image: int) -> list[dict[str, Any]]:
    """Ground truth moved about, random classes now and then, and random boxes."""
    rng = np.random.default_rng(1)
    results = []
    for image in dataset.json_dict["images"]:
        truth = [a for a in dataset.json_dict["annotations"] if a["image_id"] == image["id"]]
        for _ in range(per_image):
            annotation = truth[rng.integers(len(truth))]
            x, y, w, h = np.array(annotation["bbox"]) + rng.normal(scale=2, size=4)
            mask = np.zeros((64, 64), dtype=np.uint8)
            mask[max(0, int(y)) : max(1, int(y + h)), max(0, int(x)) : max(1, int(x + w))] = 1
            rle = mask_util.encode(np.asfortranarray(mask))
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": annotation["category_id"] if rng.random() < 0.9 else int(rng.choice([3, 7])),
                    "bbox": [float(x), float(y), max(1.0, float(w)), max(1.0, float(h))],
                    "segmentation": {"size": [64, 64], "counts": rle["counts"].decode()},
                    "score": float(rng.random()),
                }
            )
    return results


def pycocotools_precision(dataset: CocoDataset, results: list[dict[str, Any]], kind: str, max_dets: int) -> Any:
    entries = copy.deepcopy(results)
    if kind == "segm":
        for entry in entries:
            del entry["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(dataset.json_file))
        evaluation = COCOeval(truth, truth.loadRes(entries), kind)
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(("per_image", "max_dets"), [(30, 100), (300, 100), (300, 400)])
def test_equals_pycocotools(dataset: CocoDataset, kind: str, per_image: int, max_dets: int) -> None:
    results = noisy_detections(dataset, per_image)
    reference = pycocotools_precision(dataset, results, kind, max_dets).eval
    got = score(dataset, copy.deepcopy(results), kind, max_dets=max_dets)

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return 100 * float(values.mean()) if values.size else math.nan

    precision = reference["precision"][..., -1]
    assert got["AP"] == pytest.approx(mean(precision[:, :, :, 0]), abs=1e-6)
    assert got["AP50"] == pytest.approx(mean(precision[0, :, :, 0]), abs=1e-6)
    assert got["AP75"] == pytest.approx(mean(precision[5, :, :, 0]), abs=1e-6)
    for area, number in (("s", 1), ("m", 2), ("l", 3)):
        assert got[f"AP{area}"] == pytest.approx(mean(precision[:, :, :, number]), abs=1e-6, nan_ok=True)
    assert got["AR"] == pytest.approx(mean(reference["recall"][:, :, 0, -1]), abs=1e-6)
    for number, name in enumerate(("box", "disc")):  # categories 3 and 7
        assert got[f"AP-{name}"] == pytest.approx(mean(precision[:, :, number, 0]), abs=1e-6)


def test_more_detections_count_where_more_are_allowed(dataset: CocoDataset) -> None:
    results = noisy_detections(dataset, 300)
    few, many = (score(dataset, copy.deepcopy(results), "bbox", max_dets=limit)["AR"] for limit in (5, 400))
    assert few < many


def test_classes_come_back_as_the_jsons_ids(dataset: CocoDataset, tmp_path: Path) -> None:
    """A perfect detector scores 100 and its result file has the ids of the json, which start at neither 0 nor 1."""
    evaluator = CocoEvaluator(dataset, max_dets=100, output_dir=tmp_path)
    evaluator.reset()
    for record in dataset.records:
        truth = [a for a in record["annotations"] if not a["iscrowd"]]
        instances = Instances((64, 64))
        boxes = torch.tensor([a["bbox"] for a in truth])
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.full((len(truth),), 0.9)
        instances.pred_classes = torch.tensor([a["category_id"] for a in truth])
        instances.pred_masks = torch.from_numpy(np.stack([_mask(a["segmentation"]) for a in truth]))
        evaluator.process([record], [{"instances": instances}])
    scores = evaluator.evaluate()
    assert scores["bbox"]["AP"] == pytest.approx(100)
    assert scores["segm"]["AP"] == pytest.approx(100)
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {entry["category_id"] for entry in saved} == {3, 7}
    assert "box AP 100.00" in describe(scores, num_images=4, max_dets=100)


def _mask(segmentation: Any) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, 64, 64))
    return mask_util.decode(segmentation).astype(bool)


def test_no_detection_at_all_scores_zero(dataset: CocoDataset) -> None:
    assert score(dataset, [], "bbox", max_dets=100)["AP"] == 0
    assert score(dataset, [], "segm", max_dets=100)["AP"] == 0
