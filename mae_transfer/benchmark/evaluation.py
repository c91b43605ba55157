"""COCO's evaluation: ours, which is faster-coco-eval behind ``mae_transfer.detection.evaluation``, and pycocotools.

Both start from the same ground truth and detections in memory and end with COCO's twelve numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_transfer.benchmark.measure import Contestant, Spread, environment, race, ratios, table, write_json
from mae_transfer.errors import ConfigError, RunFailed

HEIGHT, WIDTH, CATEGORIES, INSTANCES = 480, 640, 80, 7  # of COCO: its usual image, and instances an image
KINDS = {"boxes": "bbox", "masks": "segm"}
_CHECKED_IMAGES = 40


def generate(num_images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth in COCO's format and results as a detector writes them: half of them near an instance."""
    import pycocotools.mask as mask_util

    rng = np.random.default_rng(0)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": f"category {number}"} for number in range(1, CATEGORIES + 1)],
    }
    results: list[dict[str, Any]] = []

    def draw(x: float, y: float, radius: float, points: int) -> tuple[list[float], dict[str, Any]]:
        angles = np.sort(rng.uniform(0, 2 * np.pi, points))
        radii = radius * rng.uniform(0.8, 1.2, points)
        xs, ys = np.clip(x + radii * np.cos(angles), 0, WIDTH), np.clip(y + radii * np.sin(angles), 0, HEIGHT)
        polygon = np.stack([xs, ys], axis=1).reshape(-1).tolist()
        return polygon, mask_util.merge(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))

    for image in range(1, num_images + 1):
        content["images"].append({"id": image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH})
        places = []
        for _ in range(INSTANCES):
            x, y, radius = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), np.exp(rng.uniform(2, 5))
            category = int(rng.integers(1, CATEGORIES + 1))
            places.append((x, y, radius, category))
            polygon, mask = draw(x, y, radius, points=30)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image,
                    "category_id": category,
                    "iscrowd": 0,
                    "area": float(mask_util.area(mask)),
                    "bbox": mask_util.toBbox(mask).tolist(),
                    "segmentation": [polygon],
                }
            )
        for _ in range(detections):
            x, y, radius, category = places[rng.integers(INSTANCES)]
            if rng.random() < 0.5:
                x, y, radius = x + radius * rng.normal() / 2, y + radius * rng.normal() / 2, radius * 1.3
            if rng.random() < 0.3:
                category = int(rng.integers(1, CATEGORIES + 1))
            _, mask = draw(x, y, radius, points=40)
            results.append(
                {
                    "image_id": image,
                    "category_id": category,
                    "bbox": mask_util.toBbox(mask).tolist(),
                    "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
                    "score": float(rng.random()),
                }
            )
    return content, results


class Evaluation(Contestant):
    """Scoring generated detections.

    Args:
        part: "boxes" or "masks".
    """

    def __init__(self, name: str, *, part: str, num_images: int, detections: int) -> None:
        self.name = name
        self.part = part
        self.num_images = num_images
        self.detections = detections
        self.scores: dict[str, float] = {}

    def set_up(self) -> None:
        self.content, self.results = generate(self.num_images, self.detections)


class Ours(Evaluation):
    """What ``tools/train_det.py`` evaluates with."""

    def imports(self) -> None:
        import mae_transfer.detection.evaluation  # noqa: F401

    def set_up(self) -> None:
        from mae_transfer.detection.dataset import Category, CocoDataset

        super().set_up()
        self.dataset = CocoDataset(
            json_file=Path("generated.json"),
            image_folder=Path(),
            categories=tuple(Category(id=c["id"], name=c["name"]) for c in self.content["categories"]),
            records=[],
            json_dict=self.content,
            mask_format="polygon",
        )

    def turn(self) -> None:
        from mae_transfer.detection.evaluation import score

        self.scores = score(self.dataset, self.results, KINDS[self.part], max_dets=100)


class Peer(Evaluation):
    """pycocotools as its own demonstration uses it."""

    def imports(self) -> None:
        import pycocotools.cocoeval  # noqa: F401

    def turn(self) -> None:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        # It writes into what it is given: fresh entries for each turn, less than a hundredth of its time.
        annotations = [{**annotation} for annotation in self.content["annotations"]]
        without_box = self.part == "masks"  # which it would take the area of a mask from
        entries = [{k: v for k, v in r.items() if not (without_box and k == "bbox")} for r in self.results]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {**self.content, "annotations": annotations}
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(entries), KINDS[self.part])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
        self.scores = dict(zip(names, (100 * evaluation.stats).tolist(), strict=True))


def contestants(part: str, *, num_images: int, detections: int) -> list[Contestant]:
    """Ours and pycocotools for "boxes" or "masks", after a check on a few images that both say the same.

    Raises:
        RunFailed: they do not.
    """
    few = min(num_images, _CHECKED_IMAGES)
    scores = []
    for kind in (Ours, Peer):
        checked = kind("", part=part, num_images=few, detections=detections)
        checked.set_up()
        checked.turn()
        scores.append(checked.scores)
    ours, theirs = scores
    wrong = [name for name, value in theirs.items() if not math.isclose(ours[name], value, abs_tol=1e-9)]
    if wrong:
        found = ", ".join(f"{name} {ours[name]:.6f} and {theirs[name]:.6f}" for name in wrong)
        raise RunFailed(f"ours and pycocotools disagree on {part}: {found}")
    return [
        kind(name, part=part, num_images=num_images, detections=detections)
        for kind, name in ((Ours, "ours"), (Peer, "pycocotools"))
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--detections", type=int, default=60, help="of each image (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every number there too")


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for counts below 1."""
    if min(arguments.images, arguments.detections, arguments.rounds, arguments.threads) < 1:
        raise ConfigError("--images, --detections, --rounds and --threads must be at least 1")
    facts = environment(arguments.threads)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{arguments.images} images of {INSTANCES} instances, {arguments.detections} detections each")
    rows, results = [], {}
    for part in KINDS:
        pair = contestants(part, num_images=arguments.images, detections=arguments.detections)
        ours, theirs = race(pair, rounds=arguments.rounds, threads=arguments.threads)
        faster = ratios(theirs.seconds, ours.seconds)
        rows.append([part, Spread.of(ours.seconds).show(), Spread.of(theirs.seconds).show(), faster.show()])
        results[part] = {timing.name: timing.seconds for timing in (ours, theirs)}
    print(table(["", "ours, s", "pycocotools, s", "faster by"], rows))
    write_json(arguments.json, {"environment": facts, "results": results})
    return 0
