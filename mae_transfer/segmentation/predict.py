"""Segment images with a trained run: what ``tools/predict.py`` calls for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import Resize
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from PIL import Image
from torch import nn

from mae_transfer.errors import CheckpointError, DataError
from mae_transfer.segmentation.config import load_config
from mae_transfer.segmentation.dataset import palette
from mae_transfer.segmentation.folder import displayed_size
from mae_transfer.segmentation.runner import checkpoints_of, load_weights
from mae_transfer.segmentation.segmentor import MAESegmentor
from mae_transfer.segmentation.visualize import draw_segmentation, save_picture


def predict_images(folder: Path, checkpoint: Path | None, images: Sequence[Path], out: Path) -> list[Path]:
    """Segment images and write, for each, an overlay with a legend and the labels as a palette PNG.

    Args:
        folder: a run's work dir, with the config that it dumped.
        checkpoint: its weights; None takes the best by mIoU, or else the last.
        images: image files of any size.
        out: receives ``NAME.png`` and ``NAME_labels.png``, whose labels are the masks' own (from 1 where the run
            reduced its zero label).

    Returns:
        The overlays.

    Raises:
        CheckpointError: no config or weights in the folder, or weights of another model.
        DataError: an image that cannot be read.
    """
    config = load_run(folder)
    model = build_model(config, checkpoint or find_checkpoint(folder))
    classes, colours = list(config.facts.classes), palette(len(config.facts.classes))
    first_label = 1 if config.settings.dataset.reduce_zero_label else 0
    written = []
    for path in images:
        image = read_image(path)
        labels = segment(model, config, image)
        picture = draw_segmentation(image[..., ::-1], labels, classes, colours)
        written.append(out / f"{path.stem}.png")
        save_picture(picture, written[-1])
        indexed = Image.fromarray((labels + first_label).astype(np.uint8), mode="P")
        indexed.putpalette([0] * 3 * first_label + [channel for colour in colours for channel in colour])
        save_picture(indexed, out / f"{path.stem}_labels.png")
    return written


def load_run(folder: Path) -> Config:
    """The config that a run dumped into its work dir.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    found = sorted(folder.glob("*.py"))
    if len(found) != 1:
        raise CheckpointError(f"{folder} holds {len(found)} config files; expected the one that train_seg left there")
    return load_config(found[0], work_dir=str(folder), for_training=False)


def find_checkpoint(folder: Path) -> Path:
    """The best checkpoint of a run by mIoU where there is one, or the last.

    Raises:
        CheckpointError: there is none.
    """
    found = sorted(folder.glob("best_mIoU_iter_*.pth")) or checkpoints_of(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint; expected iter_N.pth or best_mIoU_iter_N.pth")
    return found[-1]


def build_model(config: Config, checkpoint: Path) -> MAESegmentor:
    """The run's model with its weights, on the device, ready to predict."""
    config.model.backbone.init_checkpoint = None
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
    load_weights(model, checkpoint)
    return model.to(get_device()).eval()


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 BGR, as displayed.

    Raises:
        DataError: no readable image.
    """
    displayed_size(path)  # raises with the reason, where OpenCV would return nothing
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"image {path} cannot be read; expected JPEG, PNG, BMP, TIFF or WebP")
    return image


@torch.inference_mode()
def segment(model: MAESegmentor, config: Config, image: np.ndarray) -> np.ndarray:
    """Labels (H, W) of one (H, W, 3) uint8 BGR image, resized and cut into windows as in validation."""
    resize = next(step for step in config.test_dataloader.dataset.pipeline if step["type"] == "Resize")
    with DefaultScope.overwrite_default_scope("mmseg"):
        resized = Resize(scale=resize["scale"], keep_ratio=resize["keep_ratio"])({"img": image})["img"]
    inputs = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
    batch: dict[str, Any] = model.data_preprocessor({"inputs": [inputs]}, False)
    shape = {"ori_shape": resized.shape[:2], "img_shape": resized.shape[:2]}
    logits = model.inference(batch["inputs"], [shape])  # (1, classes, h, w)
    size = (image.shape[0], image.shape[1])
    logits = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=model.align_corners)
    return logits[0].argmax(dim=0).cpu().numpy()
