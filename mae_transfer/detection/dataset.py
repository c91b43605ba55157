"""Any COCO-format json and the folder of its images, checked once, as Detectron2's dataset dicts.

LVIS files are read as well: their images are found by the address that they were downloaded from, and what they say of
categories that were looked for (``neg_category_ids`` …) stays in ``json_dict`` for evaluation. Nothing is registered in
Detectron2's global catalogs: the categories and their ids travel with the dataset, so that evaluation maps classes back
to the json's own ids whatever they are (with gaps, from 0, or out of order).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from mae_transfer.data.look import look_at_all
from mae_transfer.data.problems import Action, Problem, refuse, summary
from mae_transfer.data.share import choose_share
from mae_transfer.detection.check import image_problems
from mae_transfer.detection.outlines import check_box, is_box, read_outline
from mae_transfer.errors import DataError

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
        json_dict: the file as read, except for the annotations that are left out or repaired: what evaluation compares
            with.
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

    @property
    def federated(self) -> bool:
        """Whether each image was searched for some categories only, as in LVIS: it says which were not found."""
        return any("neg_category_ids" in image for image in self.json_dict["images"])

    @property
    def learnable(self) -> list[dict[str, Any]]:
        """The records with an instance that is no crowd region."""
        return [r for r in self.records if any(not a["iscrowd"] for a in r["annotations"])]

    def with_instances(self) -> CocoDataset:
        """Without the images that teach nothing: no instance, or crowd regions only.

        Raises:
            DataError: no image is left.
        """
        kept = self.learnable
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
        """A share of the images, chosen by ``seed`` and the image ids alone (``choose_share``).

        Args:
            fraction: of the images, above 0 and at most 1; at least one image is kept.

        Raises:
            ConfigError: another fraction.
        """
        ids = [record["image_id"] for record in self.records]
        chosen = set(choose_share(ids, fraction, seed=seed, key="dataset.train.fraction"))
        if len(chosen) == len(ids):
            return self
        logger.info("%d of %d images are trained on (dataset.train.fraction=%g)", len(chosen), len(ids), fraction)
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
    json_file = Path(json_file)
    problems: list[Problem] = []
    categories = _categories(_read_json(json_file), problems)
    refuse(problems, json_file)
    return categories


def load_coco(
    json_file: str | Path, image_folder: str | Path, *, categories: Sequence[Category] | None = None
) -> CocoDataset:
    """Read and check a COCO json and, by their headers, its images.

    Args:
        categories: those of the training json, for a validation json: they must agree by id and name, because
            the model's classes are numbered by them.

    Raises:
        DataError: a file or folder that does not exist, a json that is not in COCO format, ids that do not match,
            images that are missing, unreadable or of another size; with the first problem of each kind.
    """
    dataset, problems = read_coco(json_file, image_folder, categories=categories)
    refuse(problems, json_file)
    assert dataset is not None
    for line in summary(problems):
        logger.warning("%s: %s", json_file, line)
    return dataset


def read_coco(
    json_file: str | Path,
    image_folder: str | Path,
    *,
    categories: Sequence[Category] | None = None,
    decode: bool = False,
) -> tuple[CocoDataset | None, list[Problem]]:
    """What ``load_coco`` returns, with every problem rather than an error at the refused ones.

    Args:
        decode: decode every image rather than look at its header.

    Returns:
        None for the dataset where a problem is refused.

    Raises:
        DataError: the json cannot be read or is not in COCO format, or the folder does not exist.
    """
    json_file, image_folder = Path(json_file), Path(image_folder)
    problems: list[Problem] = []
    data = _read_json(json_file)
    own = _categories(data, problems)
    if categories is not None:
        _check_same_categories(own, categories, problems)
        own = tuple(categories)
    if not image_folder.is_dir():
        raise DataError(f"image folder {image_folder} does not exist or is no folder")

    records = _records(data["images"], image_folder, problems)
    present = [record for record in records.values() if not _absent(record, problems)]
    for record, facts in zip(present, look_at_all([r["file_name"] for r in present], decode=decode), strict=True):
        problems += image_problems(record, facts)

    annotations, mask_format = _annotations(data["annotations"], records, own, problems)
    if any(problem.action is Action.REFUSED for problem in problems):
        return None, problems
    dataset = CocoDataset(
        json_file=json_file,
        image_folder=image_folder,
        categories=own,
        records=list(records.values()),
        json_dict={**data, "annotations": annotations},
        mask_format=mask_format,
    )
    return dataset, problems


def _read_json(json_file: Path) -> dict[str, Any]:
    if not json_file.is_file():
        raise DataError(f"annotation file {json_file} does not exist or is no file")
    try:
        data = json.loads(json_file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"annotation file {json_file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{json_file} is not readable as json: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{json_file} holds a {type(data).__name__}; a COCO json is an object with images and so on")
    absent = [key for key in ("images", "annotations", "categories") if not isinstance(data.get(key), list)]
    if absent:
        raise DataError(f"{json_file} is not a COCO instance json: it has no list of {' and '.join(absent)}")
    if not data["images"]:
        raise DataError(f"{json_file} lists no images")
    return data


def _categories(data: dict[str, Any], problems: list[Problem]) -> tuple[Category, ...]:
    categories: dict[int, Category] = {}
    for entry in data["categories"]:
        if not _has(entry, ("id", "name"), "category", problems):
            continue
        number = entry["id"]
        if not isinstance(number, int) or isinstance(number, bool):
            found = f"{number!r}; expected a whole number"
            problems.append(Problem(action=Action.REFUSED, what="category id that is no number", detail=found))
        elif number in categories:
            found = f"category id {number} is given twice, as {categories[number].name!r} and {entry['name']!r}"
            problems.append(Problem(action=Action.REFUSED, what="two categories of one id", detail=found))
        else:
            categories[number] = Category(id=number, name=str(entry["name"]))
    if not data["categories"]:
        problems.append(Problem(action=Action.REFUSED, what="no categories"))
    return tuple(categories[number] for number in sorted(categories))


def _check_same_categories(own: tuple[Category, ...], trained: Sequence[Category], problems: list[Problem]) -> None:
    known = {category.id: category.name for category in trained}
    for category in own:
        if known.get(category.id) != category.name:
            found = (
                f"category {category.id} is {category.name!r}, in the training json it is {known.get(category.id)!r}; "
                "both files must number the same categories alike"
            )
            problems.append(Problem(action=Action.REFUSED, what="another category than in training", detail=found))


def _has(entry: Any, keys: tuple[str, ...], kind: str, problems: list[Problem]) -> bool:
    absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if absent:
        found = f"it lacks {' and '.join(absent)}: {str(entry)[:120]}"
        problems.append(Problem(action=Action.REFUSED, what=f"incomplete {kind}", detail=found))
    return not absent


def _records(images: list[Any], folder: Path, problems: list[Problem]) -> dict[Any, dict[str, Any]]:
    """Records without annotations, by image id."""
    records: dict[Any, dict[str, Any]] = {}
    for image in images:
        if not _has(image, ("id", "height", "width"), "image", problems):
            continue
        number, fault = image["id"], None
        name = _file_name(image, folder)
        if not isinstance(number, (int, str)) or isinstance(number, bool):
            fault = Problem(action=Action.REFUSED, what="image id that is no number", detail=f"{number!r}")
        elif number in records:
            what, found = "two images of one id", f"image id {number} is given twice"
            fault = Problem(action=Action.REFUSED, what=what, detail=found, image=number)
        elif name is None:
            what, found = "image without a file", "it has neither a file_name nor the coco_url of LVIS"
            fault = Problem(action=Action.REFUSED, what=what, detail=found, image=number)
        elif not (_is_size(image["height"]) and _is_size(image["width"])):
            what, found = "image size that is none", f"height {image['height']!r}, width {image['width']!r}"
            fault = Problem(action=Action.REFUSED, what=what, detail=found, image=number)
        if fault is not None:
            problems.append(fault)
            continue
        records[number] = {
            "file_name": str(name),
            "image_id": number,
            "height": int(image["height"]),
            "width": int(image["width"]),
            "annotations": [],
        }
    return records


def _file_name(image: dict[str, Any], folder: Path) -> Path | None:
    name = image.get("file_name")
    if name is None and isinstance(image.get("coco_url"), str):
        # LVIS takes images of several COCO folders: …/train2017/000000155379.jpg. `folder` is above them, or the one.
        split, _, file = image["coco_url"].rpartition("/")
        split = split.rpartition("/")[2]
        return folder / split / file if (folder / split).is_dir() else folder / file
    return folder / name if isinstance(name, str) and name else None


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1 and value == int(value)


def _absent(record: dict[str, Any], problems: list[Problem]) -> bool:
    if os.path.isfile(record["file_name"]):  # noqa: PTH113 - Path's raises for names that no system allows
        return False
    found = f"{record['file_name']} is not there; give the folder that the json's file names are relative to"
    problems.append(Problem(action=Action.REFUSED, what="missing image file", detail=found, image=record["image_id"]))
    return True


def _annotations(
    entries: list[Any], records: dict[Any, dict[str, Any]], categories: Sequence[Category], problems: list[Problem]
) -> tuple[list[dict[str, Any]], str]:
    """Add instances to the records; the annotations that evaluation compares with, and the mask format."""
    classes = {category.id: number for number, category in enumerate(categories)}
    kept: list[dict[str, Any]] = []
    ids: set[Any] = set()
    any_rle = False
    for entry in entries:
        if not _has(entry, ("image_id", "category_id"), "annotation", problems):
            continue
        place = {"image": entry["image_id"], "annotation": entry.get("id")}

        def note(action: Action, what: str, detail: str, place: dict[str, Any] = place) -> None:
            record = records.get(place["image"])
            name = Path(record["file_name"]).name if record else None
            problems.append(Problem(action=action, what=what, detail=detail, file_name=name, **place))

        record = _look_up(records, entry["image_id"])
        number = _look_up(classes, entry["category_id"])
        crowd = entry.get("iscrowd", 0)
        if record is None:
            place["image"] = None
            note(Action.REFUSED, "annotation of an unknown image", f"it is of image {entry['image_id']!r}")
        if number is None:
            known = ", ".join(map(str, list(classes)[:10])) + (" …" if len(classes) > 10 else "")
            found = f"it has category {entry['category_id']!r}; the categories are {known}"
            note(Action.REFUSED, "annotation of an unknown category", found)
        if crowd not in (0, 1):
            note(Action.REFUSED, "iscrowd that is neither 0 nor 1", f"it is {crowd!r}")
        if record is None or number is None or crowd not in (0, 1):
            continue
        if not isinstance(entry.get("id"), int) or entry["id"] in ids or entry["id"] == 0:
            # pycocotools keeps one annotation an id, and takes 0 for "no match".
            found = "COCO's evaluation would miscount; it is given a number of its own there"
            note(Action.REPAIRED, "annotation id that is missing, 0, or given twice", found)
        else:
            ids.add(entry["id"])
        read = _instance(entry, (record["height"], record["width"]), note)
        if read is None:
            continue
        instance, compared = read
        record["annotations"].append({**instance, "iscrowd": int(crowd), "category_id": number})
        any_rle |= isinstance(instance["segmentation"], dict) and not crowd
        kept.append(compared)
    return kept, "bitmask" if any_rle else "polygon"


def _look_up(table: dict[Any, Any], key: Any) -> Any:
    """The entry of ``key``, or None; lists and objects are no keys, and neither is a true that means 1."""
    return table.get(key) if isinstance(key, (int, str)) and not isinstance(key, bool) else None


def _instance(
    entry: dict[str, Any], size: tuple[int, int], note: Callable[[Action, str, str], None]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The instance in Detectron2's format without its class, and what evaluation compares with; None: not used."""
    segmentation, box = entry.get("segmentation"), entry.get("bbox")
    if not segmentation:
        if not entry.get("iscrowd"):
            note(Action.REFUSED, "annotation that has no segmentation", "Mask R-CNN learns from polygons or RLE")
            return None
        if not is_box(box):
            note(Action.LEFT_OUT, "crowd region without outline and box", "")
            return None
        note(Action.REPAIRED, "crowd region without outline", "its box is used")
        x, y, width, height = box
        segmentation = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    read = read_outline(segmentation, size, note)
    if read is None:
        return None
    outline, (x0, y0, x1, y1) = read
    compared = entry
    if isinstance(outline, list) and outline != entry.get("segmentation"):
        compared = {**compared, "segmentation": outline}
    # The box follows from the outline: where the json's own box disagrees, the head would learn two truths.
    outline_box = [x0, y0, x1 - x0, y1 - y0]
    if not check_box(box, (x0, y0, x1, y1), note):
        compared = {**compared, "bbox": outline_box}
    return {"bbox": outline_box, "bbox_mode": BoxMode.XYWH_ABS, "segmentation": outline}, compared
