"""Augmented samples: what a crop keeps, that masks follow their image, and that a sample is a function of its key."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.sampler import SampleKey
from mae_transfer.detection.augment import Augmentation, fit_inside
from mae_transfer.detection.dataset import load_coco
from mae_transfer.detection.loader import TrainingSamples, _to_instances, build_test_loader, build_train_loader
from mae_transfer.errors import ConfigError, DataError

from .conftest import COLOURS


@pytest.fixture
def dataset(make_scenes: Callable[..., Any]) -> Any:
    scenes = make_scenes(num_images=4, side=96, num_instances=6)
    return load_coco(scenes.json, scenes.images)


@pytest.mark.parametrize("resize", ["native", "jitter"])
@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_masks_and_boxes_follow_the_image(dataset: Any, resize: str, mask_format: str) -> None:
    """Instances have their category's colour, so the pixels under a mask say whether it is where its instance is."""
    if mask_format == "polygon":
        dataset.records[:] = [
            {**r, "annotations": [a for a in r["annotations"] if isinstance(a["segmentation"], list)]}
            for r in dataset.records
        ]
        object.__setattr__(dataset, "mask_format", "polygon")
    augmentation = Augmentation(image_size=64, resize=resize, scale=(0.5, 2.0), flips=("horizontal", "vertical"))
    samples = TrainingSamples(dataset, augmentation, seed=0)
    seen = 0
    for epoch in range(6):
        for index in range(len(dataset.records)):
            sample = samples[SampleKey(epoch, index)]
            image, instances = sample["image"].float(), sample["instances"]
            height, width = image.shape[1:]
            assert instances.image_size == (height, width)
            assert max(height, width) <= 64
            for number in range(len(instances)):
                x0, y0, x1, y1 = instances.gt_boxes.tensor[number].tolist()
                assert 0 <= x0 < x1 <= width
                assert 0 <= y0 < y1 <= height
                centre = (int((y0 + y1) / 2), int((x0 + x1) / 2))
                if min(x1 - x0, y1 - y0) < 6:
                    continue  # a sliver at the crop's edge
                colour = COLOURS[dataset.categories[int(instances.gt_classes[number])].id]
                assert (image[:, *centre] - torch.tensor(colour)).abs().max() < 40
                if mask_format == "bitmask":
                    assert instances.gt_masks.tensor[number][centre]
                seen += 1
    assert seen > 40


def test_a_native_crop_does_not_resample(dataset: Any) -> None:
    sample = TrainingSamples(dataset, Augmentation(image_size=64, resize="native", flips=()), seed=0)[SampleKey(0, 1)]
    crop = sample["image"].numpy().transpose(1, 2, 0)
    from mae_transfer.detection.loader import read_rgb

    whole = read_rgb(dataset.records[1])
    places = [(y, x) for y in range(33) for x in range(33) if np.array_equal(whole[y : y + 64, x : x + 64], crop)]
    assert len(places) == 1


def test_a_crop_keeps_the_only_instance() -> None:
    augmentation = Augmentation(image_size=64, resize="native", flips=())
    box = np.array([[900.0, 20.0, 906.0, 28.0]])
    for index in range(200):
        transforms = augmentation.training(1000, 1000, box, seed=0, epoch=0, index=index)
        x0, y0, x1, y1 = transforms.apply_box(box)[0]
        assert 0 <= (x0 + x1) / 2 <= 64
        assert 0 <= (y0 + y1) / 2 <= 64


def test_crops_without_instances_cover_the_image() -> None:
    augmentation = Augmentation(image_size=10, resize="native", flips=())
    none = np.zeros((0, 4))
    starts = [augmentation.training(20, 30, none, seed=1, epoch=0, index=i).transforms[0] for i in range(500)]
    assert {t.y0 for t in starts} == set(range(11))
    assert {t.x0 for t in starts} == set(range(21))


def test_jitter_fits_the_square_and_evaluation_fills_it() -> None:
    augmentation = Augmentation(image_size=100, scale=(0.5, 0.5), flips=())
    transforms = augmentation.training(40, 80, np.zeros((0, 4)), seed=0, epoch=0, index=0)
    assert transforms.apply_image(np.zeros((40, 80, 3), np.uint8)).shape == (25, 50, 3)
    assert augmentation.evaluation(40, 80).apply_image(np.zeros((40, 80, 3), np.uint8)).shape == (50, 100, 3)
    assert fit_inside(1, 1000, 100) == (1, 100)


@pytest.mark.parametrize("epoch", range(4))
def test_jitter_is_detectron2s_of_the_same_draws(make_scenes: Callable[..., Any], epoch: int, monkeypatch: Any) -> None:
    """ViTDet's training mapper, its random numbers replaced by ours: the same pixels, outlines and boxes."""
    scenes = make_scenes(num_images=6, side=96, num_instances=6)
    scenes.content["annotations"] = [a for a in scenes.content["annotations"] if isinstance(a["segmentation"], list)]
    scenes.write()
    dataset = load_coco(scenes.json, scenes.images)
    samples = TrainingSamples(dataset, Augmentation(image_size=64), seed=7)
    reference = DatasetMapper(
        is_train=True,
        augmentations=[
            T.RandomFlip(horizontal=True),
            T.ResizeScale(min_scale=0.1, max_scale=2.0, target_height=64, target_width=64),
            T.FixedSizeCrop(crop_size=(64, 64), pad=False),
        ],
        image_format="RGB",
        use_instance_mask=True,
        recompute_boxes=True,
    )
    cropped = 0
    for index, record in enumerate(dataset.records):
        draws = Draws(seed=7, purpose=Purpose.CROP, epoch=epoch, index=index)
        flip, scale, place = draws.uniform(2)[0], draws.uniform(1)[0], draws.uniform(1)[0]
        numbers = iter([flip, 0.1 + (2.0 - 0.1) * scale, place])
        monkeypatch.setattr(np.random, "uniform", lambda *_args, numbers=numbers: next(numbers))
        expected, got = reference({**record}), samples[SampleKey(epoch, index)]
        assert torch.equal(got["image"], expected["image"])
        cropped += got["image"].shape[-1] == 64
        ours, theirs = got["instances"], expected["instances"]
        assert torch.equal(ours.gt_classes, theirs.gt_classes)
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
        if len(ours):
            for a, b in zip(ours.gt_masks.polygons, theirs.gt_masks.polygons, strict=True):
                # Detectron2 clips outlines also where nothing is cut off, which reorders their points.
                assert all(_same_area(p, q) for p, q in zip(a, b, strict=True))
    assert cropped


def _same_area(first: np.ndarray, second: np.ndarray) -> bool:
    areas = [shapely.Polygon(points.reshape(-1, 2)) for points in (first, second)]
    return bool(areas[0].symmetric_difference(areas[1]).area < 1e-6)


def test_jitter_draws_scales_and_places_uniformly_and_flips_half() -> None:
    augmentation = Augmentation(image_size=100)
    scales, places, flips = [], [], 0
    for index in range(2000):
        transforms = augmentation.training(100, 100, np.zeros((0, 4)), seed=0, epoch=0, index=index).transforms
        flips += isinstance(transforms[0], T.HFlipTransform)
        resize = next(t for t in transforms if isinstance(t, T.ResizeTransform))
        scales.append(resize.new_h / 100)
        for crop in transforms:
            if isinstance(crop, T.CropTransform):
                assert crop.x0 == crop.y0  # as published: one number places a crop in both directions
                places.append(crop.x0 / (resize.new_h - 100))
    # Kolmogorov-Smirnov distances of 2000 and about 1050 draws; 1.95 / sqrt(n) has a chance of 0.1 %
    assert _distance_to_uniform((np.array(scales) - 0.1) / 1.9) < 1.95 / math.sqrt(2000) + 0.01
    assert _distance_to_uniform(np.array(places)) < 1.95 / math.sqrt(len(places)) + 0.01
    assert 900 < flips < 1100


def _distance_to_uniform(values: np.ndarray) -> float:
    steps = np.arange(1, len(values) + 1) / len(values)
    return float(np.abs(np.sort(values) - steps).max())


@pytest.mark.parametrize("size", [(37, 91), (480, 640), (10, 1000), (100, 100)])
def test_evaluation_resizes_as_detectron2(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    expected = T.ResizeShortestEdge(65, 65).get_transform(image).apply_image(image)
    assert Augmentation(image_size=65).evaluation(*size).apply_image(image).shape == expected.shape


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_training_is_named_without_a_traceback(dataset: Any, workers: int) -> None:
    path = Path(dataset.records[2]["file_name"])
    path.write_bytes(path.read_bytes()[:300])
    augmentation = Augmentation(image_size=64, resize="native")
    train = build_train_loader(
        dataset, augmentation, batch_size=2, seed=0, start_iter=0, max_iter=2, num_workers=workers
    )
    for loader in (train, build_test_loader(dataset, augmentation, num_workers=workers)):
        with pytest.raises(DataError, match=r"002\.png.*check_dataset") as caught:
            list(loader)
        assert "Traceback" not in str(caught.value)


def test_a_sample_is_a_function_of_seed_epoch_and_index(dataset: Any) -> None:
    augmentation = Augmentation(image_size=64, resize="native")
    first = TrainingSamples(dataset, augmentation, seed=3)[SampleKey(2, 1)]
    again = TrainingSamples(dataset, augmentation, seed=3)[SampleKey(2, 1)]
    other = TrainingSamples(dataset, augmentation, seed=3)[SampleKey(3, 1)]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["instances"].gt_masks.tensor, again["instances"].gt_masks.tensor)
    assert not torch.equal(first["image"], other["image"])


def test_a_loader_started_later_goes_on_with_the_same_batches(dataset: Any) -> None:
    def batches(start: int, workers: int = 0, rank: int = 0, world: int = 1) -> list[list[tuple[Any, int]]]:
        loader = build_train_loader(
            dataset,
            Augmentation(image_size=64, resize="native"),
            batch_size=2,
            seed=5,
            start_iter=start,
            max_iter=7,
            num_workers=workers,
            rank=rank,
            world_size=world,
        )
        return [[(s["image_id"], int(s["image"].sum())) for s in batch] for batch in loader]

    whole = batches(0)
    assert len(whole) == 7
    assert batches(3, workers=1) == whole[3:]
    halves = [batches(0, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": "crop"}, "jitter, native"),
        ({"flips": ("up",)}, "horizontal, vertical"),
        ({"scale": (2.0, 1.0)}, "smallest, largest"),
        ({"image_size": 0}, "positive"),
    ],
)
def test_settings_that_cannot_be_meant(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(**{"image_size": 64, **change})


def test_an_outline_that_misses_the_crop_is_no_instance() -> None:
    """Its box reaches into the crop, the L itself does not; Detectron2 gives such an instance an infinite box."""
    corner = [0.0, 0.0, 60.0, 0.0, 60.0, 8.0, 8.0, 8.0, 8.0, 60.0, 0.0, 60.0]
    inside = [30.0, 30.0, 50.0, 30.0, 50.0, 50.0, 30.0, 50.0]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "segmentation": [polygon], "iscrowd": 0}
        for category, (box, polygon) in enumerate([([0, 0, 60, 60], corner), ([30, 30, 50, 50], inside)])
    ]
    instances = _to_instances(annotations, T.TransformList([T.CropTransform(20, 20, 40, 40)]), (40, 40), "polygon")
    assert instances.gt_classes.tolist() == [1]
    assert instances.gt_boxes.tensor.tolist() == [[10.0, 10.0, 30.0, 30.0]]
