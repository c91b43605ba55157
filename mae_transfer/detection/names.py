"""Data sets by the names that Detectron2 knows them by, below the folder that DETECTRON2_DATASETS names."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from mae_transfer.errors import ConfigError, nearest

_WITH_INSTANCES = ("coco", "lvis")  # Detectron2's evaluator_type of data sets with a json of instances


def find_dataset(name: str) -> tuple[Path, Path]:
    """The json and the image folder of a data set that is registered in Detectron2.

    COCO and LVIS are ("coco_2017_train", "lvis_v1_val" …), in the layout of Detectron2's documentation below
    DETECTRON2_DATASETS (``datasets`` by default), and so is what a config file or script registers by
    ``register_coco_instances``.

    Raises:
        ConfigError: no such name, a data set without instances, or one whose files are not there.
    """
    known = sorted(DatasetCatalog.list())
    if name not in known:
        guess = nearest(name, known)
        hint = f"did you mean {guess}?" if guess else "expected one such as coco_2017_train or lvis_v1_train"
        raise ConfigError(f"data set {name} is not known to Detectron2; {hint}")
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in _WITH_INSTANCES or not metadata.get("json_file"):
        raise ConfigError(
            f"data set {name} has no COCO or LVIS json of instances, which is what a detector learns from"
        )
    json_file, images = Path(metadata.json_file), Path(metadata.image_root)
    for path, kind in ((json_file, "annotations"), (images, "images")):
        if not path.exists():
            root = os.environ.get("DETECTRON2_DATASETS")
            where = f"DETECTRON2_DATASETS is {root}" if root else "DETECTRON2_DATASETS is not set, so it is datasets/"
            raise ConfigError(f"data set {name}: its {kind} are expected at {path}, where nothing is ({where})")
    return json_file, images
