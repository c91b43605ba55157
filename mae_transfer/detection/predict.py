"""Detections on any images with a trained run: overlays and a COCO result file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
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
from mae_transfer.detection.visualize import draw_predictions, save_image
from mae_transfer.engine.files import write_text
from mae_transfer.errors import CheckpointError

logger = logging.getLogger(__name__)


class Predictor:
    """A trained detector that takes RGB arrays of any size.

    Args:
        folder: of the run.
        checkpoint: a ``.pth`` of it; the last by default.

    Raises:
        CheckpointError: no checkpoint, or one that does not fit the run's config.
    """

    def __init__(self, folder: Path, checkpoint: Path | None = None, *, device: str | None = None) -> None:
        cfg = load_config(folder / "config.yaml")
        self.categories: tuple[Category, ...] = categories_of(cfg)
        self.augmentation: Augmentation = build_augmentation(cfg)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = instantiate(cfg.model).to(self.device).eval()
        checkpointer = StrictCheckpointer(self.model, str(folder))
        if checkpoint is None and not checkpointer.has_checkpoint():
            raise CheckpointError(f"{folder} holds no checkpoint yet")
        checkpointer.load(str(checkpoint or checkpointer.get_checkpoint_file()), checkpointables=[])

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.categories]

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Any:
        """Detections on (H, W, 3) uint8 RGB, as Detectron2's Instances in the image's own pixels."""
        height, width = image.shape[:2]
        resized = self.augmentation.evaluation(height, width).apply_image(image)
        return self.model([{"image": to_tensor(resized), "height": height, "width": width}])[0]["instances"]


def predict_images(
    folder: Path, checkpoint: Path | None, images: Sequence[Path], out: Path, *, min_score: float
) -> None:
    """Write an overlay for each image, ``detections.json`` (COCO results) and ``images.json`` (what its ids mean)."""
    predictor = Predictor(folder, checkpoint)
    category_ids = [category.id for category in predictor.categories]
    results: list[dict[str, Any]] = []
    for image_id, path in enumerate(images):
        image = np.array(decode_image(path, channels=3))
        instances = predictor(image)
        results += to_coco_results(instances, image_id, category_ids)
        overlay = draw_predictions(image, instances, predictor.names, min_score=min_score)
        # Numbered: folders may hold files of the same name.
        save_image(overlay, out / f"{image_id:04d}_{path.stem}.png")
    write_text(out / "detections.json", json.dumps(results))
    listing = [{"id": image_id, "file_name": str(path)} for image_id, path in enumerate(images)]
    categories = [{"id": category.id, "name": category.name} for category in predictor.categories]
    write_text(out / "images.json", json.dumps({"images": listing, "categories": categories}, indent=1))
