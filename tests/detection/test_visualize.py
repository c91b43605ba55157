"""Overlays: colours where the instances are, and nothing else changed."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances

from mae_transfer.detection.visualize import decode_mask, draw_ground_truth, draw_predictions, side_by_side


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
