"""From records to batches: reading, augmenting, and the order of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data import detection_utils as utils
from detectron2.data.samplers import InferenceSampler
from detectron2.structures import BoxMode
from torch.utils.data import DataLoader, Dataset

from mae_transfer.data.decode import decode_image
from mae_transfer.data.sampler import SampleKey, StepSampler
from mae_transfer.detection.augment import Augmentation
from mae_transfer.detection.dataset import CocoDataset
from mae_transfer.engine.signals import ignore_stop_signals
from mae_transfer.errors import DataError


def read_rgb(record: dict[str, Any]) -> np.ndarray:
    """The image of a record, (H, W, 3) uint8 in RGB, upright.

    Raises:
        DataError: unreadable, or not of the size that the json gives.
    """
    image = np.array(decode_image(record["file_name"], channels=3))
    expected = (record.get("height", image.shape[0]), record.get("width", image.shape[1]))
    if image.shape[:2] != expected:
        raise DataError(
            f"image {record['file_name']} is {image.shape[1]}x{image.shape[0]} pixels (EXIF rotation applied), "
            f"its json says {expected[1]}x{expected[0]}; correct the json or store the image as it was annotated"
        )
    return image


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) to (3, H, W); pixels stay 0..255 as Detectron2 expects them."""
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


class TrainingSamples(Dataset):
    """Augmented training samples, addressed by (epoch, index)."""

    def __init__(self, dataset: CocoDataset, augmentation: Augmentation, *, seed: int) -> None:
        # In one block of bytes: Python counts references in the objects themselves, so that a worker that only looks at
        # a million of them would come to own a copy of the memory they lie in.
        self.records = DatasetFromList(dataset.records, serialize=True)
        self.mask_format = dataset.mask_format
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        record = self.records[key.index]  # a copy of its own
        instances = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = _boxes(instances)
        transforms = self.augmentation.training(
            record["height"], record["width"], boxes, seed=self.seed, epoch=key.epoch, index=key.index
        )
        image = transforms.apply_image(read_rgb(record))
        size = image.shape[:2]
        # Masks are decoded and warped only for instances that are still there: a crop of a crowded image keeps few.
        seen = [
            instance
            for instance, box in zip(instances, transforms.apply_box(boxes) if len(boxes) else boxes)
            if _is_visible(box, size, self.augmentation.smallest_visible)
        ]
        return {
            "image": to_tensor(image),
            "instances": _to_instances(seen, transforms, size, self.mask_format),
            "image_id": record["image_id"],
            "file_name": record["file_name"],
        }


class EvaluationMapper:
    """A record to the model's input for inference; height and width are those of the stored image."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        image = read_rgb(record)
        height, width = image.shape[:2]
        resized = self.augmentation.evaluation(height, width).apply_image(image)
        return {**record, "image": to_tensor(resized), "height": height, "width": width}


def build_train_loader(
    dataset: CocoDataset,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    start_iter: int,
    max_iter: int,
    num_workers: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """``accumulate`` micro-batches for each of the iterations ``start_iter`` to ``max_iter``; ``batch_size`` counts
    all of them, in all processes, together."""
    sampler = StepSampler(
        num_samples=len(dataset.records),
        batch_size=batch_size,
        seed=seed,
        start_step=start_iter,
        stop_step=max_iter,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
    )
    return _Batches(
        _Readable(TrainingSamples(dataset, augmentation, seed=seed)),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=ignore_stop_signals,
    )


def build_test_loader(dataset: CocoDataset, augmentation: Augmentation, *, num_workers: int) -> DataLoader:
    """One image at a time, split among the processes by Detectron2's own sampler."""
    return _Batches(
        _Readable(MapDataset(DatasetFromList(dataset.records), EvaluationMapper(augmentation))),
        sampler=InferenceSampler(len(dataset.records)),
        batch_size=1,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=ignore_stop_signals,
    )


class _Readable(Dataset):
    """Samples, or the error in place of one that cannot be read: raised in a worker it would come with a traceback."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.samples[key]
        except DataError as error:
            return error


class _Batches(DataLoader):
    """Lists of samples; an unreadable one is raised in this process, as the error that it was in its worker."""

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:  # type: ignore[override]
        for batch in super().__iter__():
            for sample in batch:
                if isinstance(sample, DataError):
                    raise DataError(f"{sample}; tools/check_dataset.py finds every such image before a run")
            yield batch


def _as_list(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples


def _is_visible(box: np.ndarray, size: tuple[int, int], pixels: float) -> bool:
    """Whether ``pixels`` or more of a box (x0, y0, x1, y1), and anything at all, lie within the image."""
    seen = min(min(box[2], size[1]) - max(box[0], 0), min(box[3], size[0]) - max(box[1], 0))
    return bool(seen >= pixels and seen > 0)


def _boxes(instances: list[dict[str, Any]]) -> np.ndarray:
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in instances]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _to_instances(
    annotations: list[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int], mask_format: str
) -> Any:
    """Detectron2's Instances; boxes are recomputed from the cropped masks, empty ones are dropped."""
    annotations = [utils.transform_instance_annotations(a, transforms, size) for a in annotations]
    if mask_format == "polygon":
        # A box can reach into the crop where its outline, an L around it, does not: no polygon is left to bound.
        annotations = [a for a in annotations if len(a["segmentation"])]
    instances = utils.annotations_to_instances(annotations, size, mask_format=mask_format)
    if not len(instances):
        return instances
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    instances.gt_boxes.clip(size)  # polygons may reach outside the image
    return utils.filter_empty_instances(instances)
