"""A small labelled data set and a small classifier, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from mae_transfer.checkpoint import EncoderInfo, describe
from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.model import Classifier
from mae_transfer.classification.sections import DataConfig, ModelConfig
from tests.pictures import picture

SIZE, PATCH = 32, 8


def write_classes(root: Path, *, classes: int = 4, images: int = 6, seed: int = 0, first: int = 0) -> Path:
    """``images`` PNG files in each of the folders ``class-0``, ``class-1`` …, of several sizes."""
    for number in range(first, first + classes):
        folder = root / f"class-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for image in range(images):
            size = (40 + 4 * image, 48) if image % 2 else (36, 52)
            picture(1000 * seed + 100 * number + image, size).save(folder / f"{image}.png")
    return root


def small_config(train: Path | None = None, val: object = None, **sections: object) -> ClassificationConfig:
    """Resolved; ``val`` may be a list of folders. The model is that of ``small_classifier``."""
    data: dict[str, object] = {"image_size": SIZE, "workers": 0, "scan_cache": False}
    data |= {"train": str(train) if train else None, "val": val}
    data |= sections.pop("data", {})  # type: ignore[operator]
    model = ModelConfig(size="tiny", patch_size=PATCH, width=32, depth=2, num_heads=2)
    return ClassificationConfig(data=DataConfig(**data), model=model, **sections).filled(None)  # type: ignore[arg-type]


def small_classifier(num_classes: int = 4, *, pool: str = "mean", seed: int = 0) -> Classifier:
    """Random weights whose logits differ enough between images for ranks to be clear."""
    torch.manual_seed(seed)
    model = Classifier(
        num_classes=num_classes, pool=pool, image_size=SIZE, patch_size=PATCH, width=32, depth=2, num_heads=2
    )
    torch.nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.bias)  # type: ignore[arg-type]
    return model.eval()


def small_info(model: Classifier) -> EncoderInfo:
    return describe(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
