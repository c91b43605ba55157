"""Instances drawn on their image, and prediction beside ground truth."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw, ImageFont

from mae_transfer.engine.files import atomic_path

_Rectangle = tuple[float, float, float, float]  # x0, y0, x1, y1
_MARGIN = 2  # pixels around a label's text
_READABLE_SIDE = 512  # pixels of the longer side of a picture with labels
_GOLDEN = 0.618034  # successive hues this far apart stay distinct for any number of instances


def draw_instances(
    image: np.ndarray,
    *,
    boxes: np.ndarray,
    masks: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    opacity: float = 0.45,
    scale: int = 1,
) -> np.ndarray:
    """Masks filled, boxes outlined, each instance in a colour of its own.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (M, 4) of x0, y0, x1, y1.
        masks: M of (H, W), boolean.
        labels: M texts beside the boxes; None for none. They keep out of each other's way where there is room.
        scale: whole factor that the picture is enlarged by, pixel by pixel; what is drawn on it stays sharp.

    Returns:
        (scale·H, scale·W, 3) uint8 RGB.
    """
    canvas = image.astype(np.float32)
    colours = [instance_colour(number) for number in range(len(boxes))]
    for mask, colour in zip(masks, colours):
        canvas[mask] = canvas[mask] * (1 - opacity) + np.array(colour, dtype=np.float32) * opacity
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    drawn = drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawn)
    boxes = boxes * scale
    for box, colour in zip(boxes.tolist(), colours):
        draw.rectangle(box, outline=colour, width=max(1, scale // 2, max(drawn.size) // 600))
    if labels is not None:
        font = ImageFont.load_default(size=max(10 if scale == 1 else 13, max(drawn.size) // 60))
        taken: list[_Rectangle] = []
        for box, label, colour in zip(boxes.tolist(), labels, colours):
            place = _free_place(draw.textbbox((0, 0), label, font=font), box, drawn.size, taken)
            taken.append(place)
            draw.rectangle(place, fill=colour)
            draw.text((place[0] + _MARGIN, place[1] + _MARGIN), label, fill=(0, 0, 0), font=font)
    return np.asarray(drawn)


def readable_scale(image: np.ndarray) -> int:
    """The whole factor by which a picture of (H, W, 3) must be enlarged for labels on it to be read."""
    return max(1, round(_READABLE_SIDE / max(image.shape[:2])))


def _free_place(
    text: tuple[float, float, float, float], box: Sequence[float], size: tuple[int, int], taken: Sequence[_Rectangle]
) -> _Rectangle:
    """Where a label goes: above its box, inside at the top, below, or inside at the bottom; the first that is free."""
    width, height = text[2] + 2 * _MARGIN, text[3] + 2 * _MARGIN
    left = max(0.0, min(box[0], size[0] - 1 - width))
    tops = [top for top in (box[1] - height, box[1], box[3], box[3] - height) if 0 <= top <= size[1] - height]
    places = [(left, top, left + width, top + height) for top in tops or [0.0]]
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def instance_colour(number: int) -> tuple[int, int, int]:
    """A bright RGB colour for the ``number``-th instance."""
    red, green, blue = colorsys.hsv_to_rgb((number * _GOLDEN) % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_predictions(
    image: np.ndarray, instances: Any, names: Sequence[str], *, min_score: float, scale: int = 1
) -> np.ndarray:
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
        scale=scale,
    )


def draw_ground_truth(image: np.ndarray, record: dict[str, Any], names: Sequence[str], *, scale: int = 1) -> np.ndarray:
    """The annotated instances of a record on its image."""
    instances = [a for a in record["annotations"] if not a["iscrowd"]]
    boxes = np.array([a["bbox"] for a in instances], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [decode_mask(a["segmentation"], image.shape[0], image.shape[1]) for a in instances]
    labels = [names[a["category_id"]] for a in instances] if len(names) > 1 and len(instances) <= 30 else None
    return draw_instances(image, boxes=boxes, masks=masks, labels=labels, scale=scale)


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
