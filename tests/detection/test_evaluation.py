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
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mae_transfer.detection.dataset import CocoDataset, load_coco
from mae_transfer.detection.evaluation import CocoEvaluator, describe, score
from mae_transfer.detection.outlines import rle_runs


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


TWELVE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")


def pycocotools_score(
    content: dict[str, Any], results: list[dict[str, Any]], kind: str, limit: int, **params: Any
) -> dict[str, float]:
    """The numbers of pycocotools by our names; its own summary for its own limit of 100 detections."""
    entries = copy.deepcopy(results)
    if kind == "segm":
        for entry in entries:
            del entry["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(entries), kind)
        evaluation.params.maxDets = [1, 10, limit]
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(np.mean(values)) * 100 if values.size else math.nan

    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"]
    scores = {f"AP{letter}": mean(precision[..., area]) for area, letter in enumerate(("", "s", "m", "l"))}
    scores |= {f"AR{letter}": mean(recall[..., area, -1]) for area, letter in enumerate(("", "s", "m", "l"))}
    scores |= {"AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    scores |= {"AR1": mean(recall[..., 0, 0]), "AR10": mean(recall[..., 0, 1])}
    if limit == 100:
        stats = [math.nan if value == -1 else 100 * value for value in evaluation.stats]
        assert stats == pytest.approx([scores[name] for name in TWELVE], abs=1e-10, nan_ok=True)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for number, category in enumerate(evaluation.params.catIds):
        scores[f"AP-{names[category]}"] = mean(precision[:, :, number, 0])
    return scores


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(("per_image", "max_dets"), [(30, 100), (300, 100), (300, 400)])
def test_equals_pycocotools(dataset: CocoDataset, kind: str, per_image: int, max_dets: int) -> None:
    results = noisy_detections(dataset, per_image)
    content = json.loads(dataset.json_file.read_text())
    expected = pycocotools_score(content, results, kind, max_dets)
    assert score(dataset, results, kind, max_dets=max_dets) == pytest.approx(expected, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_pycocotools_to_the_last_digit(kind: str, tmp_path: Path) -> None:
    """Three sizes, crowds of both RLE kinds, many equal scores, an image without truth, one without detections, more
    than a hundred detections, ids out of order and with gaps, a category that never occurs."""
    content, results = photographs(20)
    dataset = as_dataset(content, tmp_path)
    got = score(dataset, results, kind, max_dets=100)
    expected = pycocotools_score(content, results, kind, 100)
    assert {name for name, value in expected.items() if math.isnan(value)} == {"AP-never"}
    assert got == pytest.approx(expected, abs=1e-10, nan_ok=True)


def photographs(num_images: int, num_categories: int = 5) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ellipses of all sizes in 300 x 400 pixels, and detections of which about half are near one."""
    rng = np.random.default_rng(3)
    height, width = 300, 400
    ids: list[int] = [7 * number + 2 for number in range(num_categories)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def ellipse(x: float, y: float, radius: float) -> list[float]:
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        xs = np.clip(x + radius * np.cos(angles), 0, width)
        ys = np.clip(y + 0.7 * radius * np.sin(angles), 0, height)
        return np.stack([xs, ys], axis=1).reshape(-1).round(2).tolist()

    for number in rng.permutation(num_images).tolist():
        image_id = 3 * number + 1
        images.append({"id": image_id, "file_name": f"{number}.png", "height": height, "width": width})
        places = []
        for place in range(0 if number == 0 else 8):
            x, y, radius = rng.uniform(0, width), rng.uniform(0, height), np.exp(rng.uniform(1.5, 5))
            category = int(rng.choice(ids))
            places.append((x, y, radius, category))
            polygon = ellipse(x, y, radius)
            rle = mask_util.merge(mask_util.frPyObjects([polygon], height, width))
            segmentation: Any = [polygon]
            if place == 1:
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            elif place == 2:
                segmentation = {"size": rle["size"], "counts": rle_runs(rle["counts"].decode()).tolist()}  # type: ignore[union-attr]
            annotations.append(
                {
                    "id": 1000 - len(annotations),
                    "image_id": image_id,
                    "category_id": category,
                    "iscrowd": int(place in (1, 2)),
                    "area": float(mask_util.area(rle)),
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "segmentation": segmentation,
                }
            )
        for _ in range(0 if number == 1 else 250 if number == 2 else 20):
            near = places and rng.random() < 0.6
            x, y, radius, category = places[rng.integers(len(places))] if near else (200, 150, 50, int(rng.choice(ids)))
            shift = rng.normal(size=2) * radius * (0.1 if near else 2)
            polygon = ellipse(x + shift[0], y + shift[1], radius * np.exp(0.1 * rng.normal()))
            rle = mask_util.merge(mask_util.frPyObjects([polygon], height, width))
            if not mask_util.area(rle):
                continue  # outside the image
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "score": float(rng.integers(20)) / 20,
                }
            )
    categories = [{"id": number, "name": f"kind {number}"} for number in ids] + [{"id": 1, "name": "never"}]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def as_dataset(content: dict[str, Any], folder: Path) -> CocoDataset:
    for image in content["images"]:
        Image.new("L", (image["width"], image["height"])).save(folder / image["file_name"])
    (folder / "instances.json").write_text(json.dumps(content))
    return load_coco(folder / "instances.json", folder)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ids_that_pycocotools_miscounts_do_not_matter(kind: str, tmp_path: Path) -> None:
    """Annotations without ids, with ids from 0 and given twice, images named by text, no area, no iscrowd."""
    content, results = photographs(4)
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    expected = score(as_dataset(content, tmp_path), results, kind, max_dets=100)
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number // 2
        del annotation["area"], annotation["iscrowd"]
    del content["annotations"][5]["id"]
    for entry in [*content["images"], *content["annotations"], *results]:
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = f"photo {entry[key]:03d}"
    assert score(as_dataset(content, tmp_path), results, kind, max_dets=100) == pytest.approx(
        expected, abs=1e-10, nan_ok=True
    )


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_lvis_scores_what_was_looked_for(kind: str, tmp_path: Path) -> None:
    """A category is scored on the images where it is, or was looked for in vain, by their best detections; where not
    all of it was outlined, what matches nothing is no error. pycocotools computes the same of those images only, one
    category at a time, with a crowd region over the whole image that matches without being counted."""
    content, results = photographs(12)
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    content["categories"] = [c for c in content["categories"] if c["name"] != "never"]
    rng = np.random.default_rng(0)
    present = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
    ids = [category["id"] for category in content["categories"]]
    for number, category in enumerate(content["categories"]):
        category["frequency"] = "rcf"[number % 3]
    for image in content["images"]:
        absent = [number for number in ids if (image["id"], number) not in present]
        image["neg_category_ids"] = [number for number in absent if rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [n for n in ids if n not in absent and rng.random() < 0.4]
    limit = 60  # the image with 250 detections has more
    best = [
        result
        for image in content["images"]
        for result in sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])[:limit]
    ]
    expected = {c["name"]: _lvis_by_pycocotools(content, best, kind, c) for c in content["categories"]}
    got = score(as_dataset(content, tmp_path), results, kind, max_dets=limit)
    for name, value in expected.items():
        assert got[f"AP-{name}"] == pytest.approx(value, abs=1e-10)
    assert got["AP"] == pytest.approx(np.mean(list(expected.values())), abs=1e-9)
    for letter in "rcf":
        of_group = [expected[c["name"]] for c in content["categories"] if c["frequency"] == letter]
        assert got[f"AP{letter}"] == pytest.approx(np.mean(of_group), abs=1e-9)
    # Without what makes it federated, detections in images that were not searched count as errors.
    for image in content["images"]:
        del image["neg_category_ids"]
    assert score(as_dataset(content, tmp_path), results, kind, max_dets=limit)["AP"] < got["AP"]


def _lvis_by_pycocotools(
    content: dict[str, Any], results: list[dict[str, Any]], kind: str, category: dict[str, Any]
) -> float:
    present = {a["image_id"] for a in content["annotations"] if a["category_id"] == category["id"]}
    images = [i for i in content["images"] if i["id"] in present or category["id"] in i["neg_category_ids"]]
    everywhere = [
        {
            "id": 10**6 + number,
            "image_id": image["id"],
            "category_id": category["id"],
            "iscrowd": 1,
            "area": 1.0,
            "bbox": [0, 0, image["width"], image["height"]],
            "segmentation": {
                "size": [image["height"], image["width"]],
                "counts": [0, image["height"] * image["width"]],
            },
        }
        for number, image in enumerate(images)
        if category["id"] in image["not_exhaustive_category_ids"]
    ]
    kept = {image["id"] for image in images}
    part = {
        "images": images,
        "categories": [category],
        "annotations": [
            *(a for a in content["annotations"] if a["image_id"] in kept and a["category_id"] == category["id"]),
            *everywhere,
        ],
    }
    of_it = [r for r in results if r["image_id"] in kept and r["category_id"] == category["id"]]
    return pycocotools_score(part, of_it, kind, 300)["AP"]


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
