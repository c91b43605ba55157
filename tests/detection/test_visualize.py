"""Overlays: colours where the instances are, and nothing else changed."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances

from mae_transfer.detection.visualize import (
    decode_mask,
    draw_ground_truth,
    draw_predictions,
    instance_colour,
    readable_scale,
    side_by_side,
)


def test_instances_are_drawn_where_they_are() -> None:
    image = np.full((40, 50, 3), 100, dtype=np.uint8)
    record = {
        "annotations": [
            {"bbox": [5, 6, 10, 8], "segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]], "iscrowd": 0, "category_id": 0},
            {"bbox": [30, 30, 9, 9], "segmentation": [[30, 30, 39, 30, 39, 39]], "iscrowd": 1, "category_id": 0},
        ]
    }
    drawn = draw_ground_truth(image, record, ["nucleus"])
    assert drawn.shape == image.shape
    changed = (drawn != image).any(axis=2)
    assert changed[7:13, 6:14].all()
    assert not changed[16:].any()  # the crowd region is not drawn
    assert not changed[:, 17:].any()


def test_weak_detections_are_left_out() -> None:
    image = np.full((40, 50, 3), 100, dtype=np.uint8)
    instances = Instances((40, 50))
    instances.pred_boxes = Boxes(torch.tensor([[2.0, 2, 12, 12], [30, 20, 45, 35]]))
    instances.scores = torch.tensor([0.9, 0.3])
    instances.pred_classes = torch.tensor([0, 1])
    instances.pred_masks = torch.zeros(2, 40, 50, dtype=torch.bool)
    changed = (draw_predictions(image, instances, ["cat", "dog"], min_score=0.5) != image).any(axis=2)
    assert changed[2, 2:12].all()
    assert not changed[20:36, 30:46].any()


def crowded() -> Instances:
    instances = Instances((85, 128))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 20, 80, 70], [12, 22, 60, 60], [70, 3, 120, 40], [5, 5, 30, 20]]))
    instances.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    instances.pred_classes = torch.tensor([0, 1, 0, 1])
    instances.pred_masks = torch.zeros(4, 85, 128, dtype=torch.bool)
    return instances


def test_labels_of_a_small_picture_stay_apart() -> None:
    """On a picture of 128 px, enlarged: every label is seen whole, on a ground of its instance's own colour."""
    image = np.zeros((85, 128, 3), np.uint8)
    scale = readable_scale(image)
    assert scale == 4
    drawn = draw_predictions(image, crowded(), ["motorcycle", "zebra"], min_score=0.5, scale=scale)
    assert drawn.shape == (340, 512, 3)
    for number in range(4):
        ground = (drawn == instance_colour(number)).all(axis=2)
        # A label's ground is far more than the lines of its box.
        rows = np.flatnonzero(ground.sum(axis=1) > 0)
        assert rows.size and ground.sum() > 1000 and ground.sum(axis=1).max() > 40


def test_large_pictures_are_not_enlarged() -> None:
    assert readable_scale(np.zeros((480, 640, 3), np.uint8)) == 1
    assert readable_scale(np.zeros((4000, 3000, 3), np.uint8)) == 1


def test_labels_at_the_edges_stay_inside() -> None:
    image = np.zeros((30, 40, 3), np.uint8)
    instances = Instances((30, 40))
    instances.pred_boxes = Boxes(torch.tensor([[-3.0, -3, 45, 35], [35, 25, 40, 30]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    instances.pred_masks = torch.zeros(2, 30, 40, dtype=torch.bool)
    drawn = draw_predictions(image, instances, ["a", "a very long name of a category"], min_score=0.5, scale=2)
    assert drawn.shape == (60, 80, 3)


def test_polygons_and_rle_are_the_same_mask() -> None:
    mask = decode_mask([[5, 6, 15, 6, 15, 14, 5, 14]], 20, 20)
    assert mask.sum() == 80
    rle = {"size": [20, 20], "counts": [20 * 5 + 6, 8] + [12, 8] * 9 + [20 * 20 - (20 * 5 + 6) - 8 - 9 * 20]}
    assert np.array_equal(decode_mask(mask_util.frPyObjects(rle, 20, 20), 20, 20), mask)


def test_side_by_side_keeps_both() -> None:
    left, right = np.zeros((4, 5, 3), np.uint8), np.full((4, 7, 3), 9, np.uint8)
    joined = side_by_side(left, right, gap=2)
    assert joined.shape == (4, 14, 3)
    assert (joined[:, 5:7] == 255).all()
    assert np.array_equal(joined[:, 7:], right)
