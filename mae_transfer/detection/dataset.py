"""Any COCO-format json and the folder of its images, checked once, as Detectron2's dataset dicts.

Nothing is registered in Detectron2's global catalogs: the categories and their ids travel with the dataset, so that
evaluation maps classes back to the json's own ids whatever they are (with gaps, from 0, or out of order).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from mae_transfer.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Category:
    """A category as the json has it; its class number is its place in ``CocoDataset.categories``."""

    id: int
    name: str


@dataclass(frozen=True, kw_only=True)
class CocoDataset:
    """Images with instances.

    Attributes:
        records: one dict an image in Detectron2's format; ``category_id`` is the class number, 0-based and without
            gaps. Crowd regions keep ``iscrowd`` 1; instances without a usable outline are left out.
        json_dict: the file as read: what evaluation compares with.
        mask_format: "polygon", or "bitmask" as soon as one instance is stored as RLE.
    """

    json_file: Path
    image_folder: Path
    categories: tuple[Category, ...]
    records: list[dict[str, Any]] = field(repr=False)
    json_dict: dict[str, Any] = field(repr=False)
    mask_format: str

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.categories]

    def with_instances(self) -> CocoDataset:
        """Without the images that teach nothing: no instance, or crowd regions only.

        Raises:
            DataError: no image is left.
        """
        kept = [r for r in self.records if any(not a["iscrowd"] for a in r["annotations"])]
        if not kept:
            raise DataError(f"{self.json_file}: no image has an instance to train on")
        if len(kept) < len(self.records):
            logger.info(
                "%d of %d images have no instance and are left out", len(self.records) - len(kept), len(self.records)
            )
        return self._replace(kept)

    def at_most(self, max_size: int) -> CocoDataset:
        """Only images whose longer side has at most ``max_size`` pixels, in the records and in what is evaluated.

        Raises:
            DataError: no image is left.
        """
        kept = [r for r in self.records if max(r["height"], r["width"]) <= max_size]
        if not kept:
            raise DataError(f"{self.json_file}: no image is at most {max_size} pixels on its longer side")
        return self._replace(kept)

    def part(self, fraction: float, *, seed: int) -> CocoDataset:
        """A share of the images, chosen by ``seed`` and the image ids alone: the order in the json does not matter.

        A smaller share of the same seed lies within a larger one, so that runs on 25 % and 50 % of the labels differ
        by what is added, not by what was drawn.

        Args:
            fraction: of the images, above 0 and at most 1; at least one image is kept.

        Raises:
            ConfigError: another fraction.
        """
        if not 0 < fraction <= 1:
            raise ConfigError(f"dataset.train.fraction={fraction}: expected a share above 0 and at most 1")
        if fraction == 1:
            return self
        count = max(1, round(fraction * len(self.records)))

        def lot(record: dict[str, Any]) -> bytes:
            return hashlib.sha256(f"{seed} {record['image_id']}".encode()).digest()

        chosen = {record["image_id"] for record in sorted(self.records, key=lot)[:count]}
        logger.info("%d of %d images are trained on (dataset.train.fraction=%g)", count, len(self.records), fraction)
        return self._replace([record for record in self.records if record["image_id"] in chosen])

    def _replace(self, records: list[dict[str, Any]]) -> CocoDataset:
        ids = {record["image_id"] for record in records}
        json_dict = {
            **self.json_dict,
            "images": [image for image in self.json_dict["images"] if image["id"] in ids],
            "annotations": [a for a in self.json_dict["annotations"] if a["image_id"] in ids],
        }
        return CocoDataset(
            json_file=self.json_file,
            image_folder=self.image_folder,
            categories=self.categories,
            records=records,
            json_dict=json_dict,
            mask_format=self.mask_format,
        )


def read_categories(json_file: str | Path) -> tuple[Category, ...]:
    """The categories of a COCO json, ordered by id.

    Raises:
        DataError: no such file, not COCO format, or an id given twice.
    """
    return _categories(_read_json(Path(json_file)), Path(json_file))


def load_coco(
    json_file: str | Path, image_folder: str | Path, *, categories: Sequence[Category] | None = None
) -> CocoDataset:
    """Read and check a COCO json and that its images exist.

    Args:
        categories: those of the training json, for a validation json: they must agree by id and name, because
            the model's classes are numbered by them.

    Raises:
        DataError: a file or folder that does not exist, a json that is not in COCO format, ids that do not match,
            image files that are missing.
    """
    json_file, image_folder = Path(json_file), Path(image_folder)
    data = _read_json(json_file)
    own = _categories(data, json_file)
    if categories is not None:
        _check_same_categories(own, tuple(categories), json_file)
        own = tuple(categories)
    if not image_folder.is_dir():
        raise DataError(f"image folder {image_folder} does not exist or is no folder")

    records: dict[int, dict[str, Any]] = {}
    for image in data["images"]:
        _need(image, ("id", "file_name", "height", "width"), "image", json_file)
        if image["id"] in records:
            raise DataError(f"{json_file}: image id {image['id']} is given twice")
        records[image["id"]] = {
            "file_name": str(image_folder / image["file_name"]),
            "image_id": image["id"],
            "height": int(image["height"]),
            "width": int(image["width"]),
            "annotations": [],
        }
    missing = [r["file_name"] for r in records.values() if not Path(r["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(records)} images of {json_file} are not in {image_folder}; the first is "
            f"{missing[0]}. Give the folder that the json's file names are relative to"
        )

    classes = {category.id: number for number, category in enumerate(own)}
    any_rle, unusable = False, 0
    for annotation in data["annotations"]:
        _need(annotation, ("id", "image_id", "category_id", "bbox"), "annotation", json_file)
        if annotation["image_id"] not in records:
            raise DataError(
                f"{json_file}: annotation {annotation['id']} is of image {annotation['image_id']}, which is not there"
            )
        if annotation["category_id"] not in classes:
            raise DataError(
                f"{json_file}: annotation {annotation['id']} has category {annotation['category_id']}; "
                f"the file's categories are {sorted(classes)}"
            )
        record = records[annotation["image_id"]]
        instance = _instance(annotation, record, json_file)
        if instance is None:
            unusable += 1
            continue
        instance["category_id"] = classes[annotation["category_id"]]
        any_rle |= isinstance(instance["segmentation"], dict) and not instance["iscrowd"]
        record["annotations"].append(instance)
    if unusable:
        logger.warning("%s: %d instances have no usable outline or box and are not trained on", json_file, unusable)
    return CocoDataset(
        json_file=json_file,
        image_folder=image_folder,
        categories=own,
        records=list(records.values()),
        json_dict=data,
        mask_format="bitmask" if any_rle else "polygon",
    )


def _read_json(json_file: Path) -> dict[str, Any]:
    if not json_file.is_file():
        raise DataError(f"annotation file {json_file} does not exist")
    try:
        data = json.loads(json_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{json_file} is not readable as json: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{json_file} holds a {type(data).__name__}; a COCO json is an object with images and so on")
    absent = [key for key in ("images", "annotations", "categories") if not isinstance(data.get(key), list)]
    if absent:
        raise DataError(f"{json_file} is not a COCO instance json: it has no list of {' and '.join(absent)}")
    if not data["images"]:
        raise DataError(f"{json_file} lists no images")
    return data


def _categories(data: dict[str, Any], json_file: Path) -> tuple[Category, ...]:
    for category in data["categories"]:
        _need(category, ("id", "name"), "category", json_file)
    ids = [category["id"] for category in data["categories"]]
    if not ids:
        raise DataError(f"{json_file} lists no categories")
    if len(set(ids)) < len(ids):
        raise DataError(f"{json_file}: a category id is given twice in {sorted(ids)}")
    return tuple(Category(id=c["id"], name=str(c["name"])) for c in sorted(data["categories"], key=lambda c: c["id"]))


def _check_same_categories(own: tuple[Category, ...], trained: tuple[Category, ...], json_file: Path) -> None:
    known = {category.id: category.name for category in trained}
    for category in own:
        if known.get(category.id) != category.name:
            raise DataError(
                f"{json_file}: category {category.id} is {category.name!r}, in the training json it is "
                f"{known.get(category.id)!r}; both files must number the same categories alike"
            )


def _need(entry: Any, keys: tuple[str, ...], kind: str, json_file: Path) -> None:
    absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if absent:
        raise DataError(f"{json_file}: an entry of kind {kind} lacks {' and '.join(absent)}: {str(entry)[:120]}")


def _instance(annotation: dict[str, Any], record: dict[str, Any], json_file: Path) -> dict[str, Any] | None:
    """The instance in Detectron2's format without its class, or None where it has no usable outline or box."""
    crowd = int(annotation.get("iscrowd", 0))
    segmentation = annotation.get("segmentation")
    if not segmentation:
        if crowd:
            return None
        raise DataError(
            f"{json_file}: annotation {annotation['id']} has no segmentation; Mask R-CNN learns from outlines, "
            "so every instance needs polygons or RLE"
        )
    size = (record["height"], record["width"])
    if isinstance(segmentation, dict):
        if not {"size", "counts"} <= segmentation.keys():
            raise DataError(f"{json_file}: annotation {annotation['id']} has an RLE without size and counts")
        if tuple(segmentation["size"]) != size:
            raise DataError(
                f"{json_file}: annotation {annotation['id']} has an RLE of size {segmentation['size']}, "
                f"its image is {list(size)} (height, width)"
            )
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *size)
        box = mask_util.toBbox(segmentation).tolist()
    else:
        # Fewer than three points are no area; an odd number of values is no list of points.
        segmentation = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
        if not segmentation:
            return None
        xs = [x for polygon in segmentation for x in polygon[0::2]]
        ys = [y for polygon in segmentation for y in polygon[1::2]]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    # The box follows from the outline: where the json's own box disagrees, the head would learn two truths.
    if box[2] <= 0 or box[3] <= 0:
        return None
    return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "segmentation": segmentation, "iscrowd": crowd}
