"""Detections on any images with a trained run: the ``Predictor`` class, overlays and a COCO result file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate

from mae_transfer.data.decode import decode_image
from mae_transfer.detection.augment import Augmentation
from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.config import build_augmentation, categories_of, load_config
from mae_transfer.detection.dataset import Category
from mae_transfer.detection.evaluation import to_coco_results
from mae_transfer.detection.loader import to_tensor
from mae_transfer.detection.visualize import draw_predictions, readable_scale, save_image
from mae_transfer.engine.files import write_text
from mae_transfer.engine.hardware import named_device
from mae_transfer.errors import CheckpointError, ConfigError, DataError


class Predictor:
    """A trained detector for images of any size, one or several at a time.

    >>> predictor = Predictor("runs/detection", min_score=0.5)  # doctest: +SKIP
    >>> instances = predictor("image.jpg")  # doctest: +SKIP
    >>> [predictor.names[label] for label in instances.pred_classes]  # doctest: +SKIP

    Args:
        folder: of the run, or a ``.pth`` in it.
        checkpoint: a ``.pth`` of the run; by default the last. ``model_best.pth`` is the best by the run's metric.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        min_score: detections below it are left out; 0 keeps what the model itself does
            (``model.score_threshold``).

    Raises:
        CheckpointError: no checkpoint, or one that does not fit the run's config.
        ConfigError: no such device, or no score.
    """

    def __init__(
        self,
        folder: str | Path,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        min_score: float = 0.0,
    ) -> None:
        folder = Path(folder)
        if folder.is_file():
            folder, checkpoint = folder.parent, checkpoint or folder
        check_score(min_score, "min_score")
        cfg = load_config(folder / "config.yaml")
        self.categories: tuple[Category, ...] = categories_of(cfg)
        self.augmentation: Augmentation = build_augmentation(cfg)
        self.device = named_device(device or "auto", "device")
        self.min_score = min_score
        self.model = instantiate(cfg.model).to(self.device).eval()
        checkpointer = StrictCheckpointer(self.model, str(folder))
        if checkpoint is None and not checkpointer.has_checkpoint():
            raise CheckpointError(f"{folder} holds no checkpoint yet")
        checkpointer.load_for_inference(str(checkpoint or checkpointer.last_good()))

    @property
    def names(self) -> list[str]:
        """Of the categories, by the ``pred_classes`` of a detection."""
        return [category.name for category in self.categories]

    def __call__(self, image: np.ndarray | str | Path) -> Any:
        """Detections on an image, as Detectron2's Instances in the image's own pixels.

        Args:
            image: (H, W, 3) uint8 in RGB, or a file.

        Raises:
            DataError: an array of another kind, or a file that cannot be read.
        """
        return self.batch([image])[0]

    @torch.no_grad()
    def batch(self, images: Sequence[np.ndarray | str | Path]) -> list[Any]:
        """Detections on each of several images, computed together where they are padded to the same size.

        What is found in an image does not depend on those beside it: padding that only a neighbour needs would take
        part in its attention.
        """
        inputs = [self._input(image) for image in images]
        multiple = self.model.backbone.size_divisibility
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, entry in enumerate(inputs):
            padded = tuple(-(-side // multiple) for side in entry["image"].shape[1:])
            alike.setdefault(padded, []).append(number)
        found: dict[int, Any] = {}
        for numbers in alike.values():
            outputs = self.model([inputs[number] for number in numbers])
            found |= {number: output["instances"] for number, output in zip(numbers, outputs)}
        kept = [found[number] for number in range(len(inputs))]
        return [instances[instances.scores >= self.min_score] for instances in kept] if self.min_score else kept

    def _input(self, image: np.ndarray | str | Path) -> dict[str, Any]:
        if not isinstance(image, np.ndarray):
            image = np.array(decode_image(image, channels=3))
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(f"an image is {image.dtype} of shape {image.shape}; expected uint8 (height, width, 3), RGB")
        height, width = image.shape[:2]
        resized = self.augmentation.evaluation(height, width).apply_image(image)
        return {"image": to_tensor(resized), "height": height, "width": width}


def predict_images(
    folder: Path,
    checkpoint: Path | None,
    images: Sequence[Path],
    out: Path,
    *,
    min_score: float,
    device: str = "auto",
    batch_size: int = 1,
    json_file: Path | None = None,
) -> None:
    """Write an overlay for each image, ``detections.json`` (COCO results) and ``images.json`` (what its ids mean).

    Args:
        min_score: of what is drawn; ``detections.json`` holds everything that the model keeps.
        batch_size: images computed together.
        json_file: a COCO json that lists the images: results then carry its image ids, and can be scored with it.

    Raises:
        CheckpointError, ConfigError: as ``Predictor``.
        DataError: images that the json does not list; at the end, with everything else written, images that could
            not be read.
    """
    check_score(min_score, "--min-score")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: expected a whole number above 0")
    predictor = Predictor(folder, checkpoint, device=device)
    ids = range(len(images)) if json_file is None else ids_in(json_file, images, predictor.categories)
    category_ids = [category.id for category in predictor.categories]
    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    digits = max(4, len(str(len(images))))
    for group in _groups(_read(images, unreadable), batch_size):
        for (number, image), instances in zip(group, predictor.batch([image for _, image in group])):
            results += to_coco_results(instances, ids[number], category_ids)
            overlay = draw_predictions(
                image, instances, predictor.names, min_score=min_score, scale=readable_scale(image)
            )
            # Numbered: folders may hold files of the same name.
            save_image(overlay, out / f"{number:0{digits}d}_{images[number].stem}.png")
    write_text(out / "detections.json", json.dumps(results))
    listing = [{"id": image_id, "file_name": str(path)} for image_id, path in zip(ids, images)]
    categories = [{"id": category.id, "name": category.name} for category in predictor.categories]
    write_text(out / "images.json", json.dumps({"images": listing, "categories": categories}, indent=1))
    if unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(images)} images could not be read, the others are in {out}: "
            + "; ".join(unreadable[:5])
            + (" …" if len(unreadable) > 5 else "")
        )


def _read(paths: Sequence[Path], unreadable: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Number and pixels of each image; what is wrong with one that cannot be read is added to ``unreadable``."""
    for number, path in enumerate(paths):
        try:
            yield number, np.array(decode_image(path, channels=3))
        except DataError as error:
            unreadable.append(str(error))


def _groups(numbered: Iterator[tuple[int, np.ndarray]], size: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    while group := list(islice(numbered, size)):
        yield group


def ids_in(json_file: Path, images: Sequence[Path], categories: Sequence[Category]) -> list[Any]:
    """The ids that a COCO json gives to image files, found by as much of their paths as it names.

    The json needs no annotations: those of test sets have none.

    Raises:
        DataError: unreadable, files that it does not list, or another category under an id of the run.
    """
    try:
        content = json.loads(json_file.read_text(encoding="utf-8-sig"))
        # LVIS names the address that an image was downloaded from.
        by_name = {
            image.get("file_name") or image["coco_url"].rpartition("/")[2]: image["id"] for image in content["images"]
        }
        listed = {category["id"]: category["name"] for category in content.get("categories", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--json {json_file} cannot be used ({type(error).__name__}: {error}); expected a COCO json whose images "
            "have an id and a file_name"
        ) from error
    for category in categories:
        if listed.get(category.id, category.name) != category.name:
            raise DataError(
                f"{json_file}: category {category.id} is {listed[category.id]!r}, in the run it is {category.name!r}; "
                "results with the run's ids would be scored as other things. Give a json of the same categories"
            )
    ids, absent = [], []
    for path in images:
        whole = path.absolute()
        tails = (whole.as_posix(), *("/".join(whole.parts[start:]) for start in range(1, len(whole.parts))))
        name = next((tail for tail in tails if tail in by_name), None)
        if name is None:
            absent.append(path)
        else:
            ids.append(by_name[name])
    if absent:
        raise DataError(
            f"{json_file} does not list {len(absent)} of the {len(images)} images, such as {absent[0]}; give those "
            "that it lists, or leave --json out"
        )
    return ids


def check_score(score: float, name: str) -> None:
    """Raise ConfigError where ``score``, given as ``name``, is none."""
    if not 0 <= score <= 1:
        raise ConfigError(f"{name} {score}: expected a score between 0 and 1")
