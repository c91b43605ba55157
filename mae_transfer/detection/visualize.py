"""Instances drawn on their image, and prediction beside ground truth."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw

from mae_transfer.engine.files import atomic_path

_GOLDEN = 0.618034  # successive hues this far apart stay distinct for any number of instances


def draw_instances(
    image: np.ndarray,
    *,
    boxes: np.ndarray,
    masks: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    opacity: float = 0.45,
) -> np.ndarray:
    """Masks filled, boxes outlined, each instance in a colour of its own.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (M, 4) of x0, y0, x1, y1.
        masks: M of (H, W), boolean.
        labels: M texts beside the boxes; None for none.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    canvas = image.astype(np.float32)
    colours = [instance_colour(number) for number in range(len(boxes))]
    for mask, colour in zip(masks, colours):
        canvas[mask] = canvas[mask] * (1 - opacity) + np.array(colour, dtype=np.float32) * opacity
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for number, (box, colour) in enumerate(zip(boxes, colours)):
        draw.rectangle([float(value) for value in box], outline=colour)
        if labels is not None:
            place = (max(0.0, float(box[0])) + 2, max(0.0, float(box[1])) + 1)
            draw.rectangle(draw.textbbox(place, labels[number]), fill=(0, 0, 0))
            draw.text(place, labels[number], fill=colour)
    return np.asarray(drawn)


def instance_colour(number: int) -> tuple[int, int, int]:
    """A bright RGB colour for the ``number``-th instance."""
    red, green, blue = colorsys.hsv_to_rgb((number * _GOLDEN) % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_predictions(image: np.ndarray, instances: Any, names: Sequence[str], *, min_score: float) -> np.ndarray:
    """Detections of at least ``min_score`` on their image; ``instances`` are a detector's output for it."""
    instances = instances.to("cpu")
    instances = instances[instances.scores >= min_score]
    labels = [
        f"{names[label]} {value:.2f}" if len(names) > 1 else f"{value:.2f}"
        for label, value in zip(instances.pred_classes.tolist(), instances.scores.tolist())
    ]
    return draw_instances(
        image,
        boxes=instances.pred_boxes.tensor.numpy(),
        masks=list(instances.pred_masks.numpy().astype(bool)),
        labels=labels if len(labels) <= 30 else None,  # a crowd's labels would hide the crowd
    )


def draw_ground_truth(image: np.ndarray, record: dict[str, Any], names: Sequence[str]) -> np.ndarray:
    """The annotated instances of a record on its image."""
    instances = [a for a in record["annotations"] if not a["iscrowd"]]
    boxes = np.array([a["bbox"] for a in instances], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [decode_mask(a["segmentation"], image.shape[0], image.shape[1]) for a in instances]
    labels = [names[a["category_id"]] for a in instances] if len(names) > 1 and len(instances) <= 30 else None
    return draw_instances(image, boxes=boxes, masks=masks, labels=labels)


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO polygons or RLE as (H, W) boolean."""
    if isinstance(segmentation, dict):
        return mask_util.decode(segmentation).astype(bool)
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(segmentation, height, width))).astype(bool)


def side_by_side(*images: np.ndarray, gap: int = 6) -> np.ndarray:
    """Images of equal height next to each other with a white gap."""
    bar = np.full((images[0].shape[0], gap, 3), 255, dtype=np.uint8)
    parts: list[np.ndarray] = []
    for image in images:
        parts += [image, bar]
    return np.concatenate(parts[:-1], axis=1)


def save_image(image: np.ndarray, path: Path) -> None:
    """(H, W, 3) uint8 to a file whose ending gives the format."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
