"""Data sets by the names they have in Detectron2, COCO's and LVIS's layouts, and names that lead nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mae_transfer.detection.config import load_config, resolve
from mae_transfer.detection.dataset import load_coco
from mae_transfer.detection.names import find_dataset
from mae_transfer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "detection" / "tiny.py"


@pytest.fixture
def registered(make_scenes: Callable[..., Any]) -> Iterator[Any]:
    scenes = make_scenes(num_images=2, side=48)
    register_coco_instances("own_scenes", {}, str(scenes.json), str(scenes.images))
    yield scenes
    DatasetCatalog.remove("own_scenes")
    MetadataCatalog.remove("own_scenes")


def test_a_registered_name_stands_for_json_and_images(registered: Any) -> None:
    assert find_dataset("own_scenes") == (registered.json, registered.images)
    cfg = resolve(load_config(TINY, ["dataset.train.name=own_scenes", "dataset.val.name=own_scenes"]))
    for part in (cfg.dataset.train, cfg.dataset.val):
        assert (part.json, part.images) == (str(registered.json), str(registered.images))
    assert resolve(cfg).dataset == cfg.dataset  # what is saved names the files, and resolves to itself


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco_2017_trian", "did you mean coco_2017_train?"),
        ("coco_2017_train", r"annotations are expected at .*coco/annotations/instances_train2017.json, where nothing"),
        ("lvis_v1_val", r"expected at .*lvis/lvis_v1_val.json, where nothing is \(DETECTRON2_DATASETS"),
        ("cityscapes_fine_instance_seg_train", "no COCO or LVIS json"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_dataset(name)


def test_a_name_and_files_are_one_too_many(registered: Any) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.val\.name=own_scenes .* not both"):
        resolve(load_config(TINY, [*registered.overrides, "dataset.val.name=own_scenes"]))


@pytest.mark.parametrize("above", [True, False])
def test_lvis_images_are_found_by_their_address(registered: Any, above: bool) -> None:
    """LVIS gives no file name; its folder is the one above COCO's, or the one where all images are."""
    folder = registered.images
    if above:
        folder = registered.images.parent / "coco"
        folder.mkdir()
        registered.images.rename(folder / "train2017")
    for image in registered.content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image.update(neg_category_ids=[7], not_exhaustive_category_ids=[])
    registered.write()
    dataset = load_coco(registered.json, folder)
    assert all(Path(record["file_name"]).is_file() for record in dataset.records)
    assert dataset.federated
    assert not load_coco_without(registered, folder).federated


def load_coco_without(scenes: Any, folder: Path) -> Any:
    for image in scenes.content["images"]:
        del image["neg_category_ids"]
    scenes.write()
    return load_coco(scenes.json, folder)


@pytest.mark.slow
def test_coco_lies_below_detectron2_datasets(make_scenes: Callable[..., Any], tmp_path: Path) -> None:
    scenes = make_scenes(num_images=2, side=48)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    scenes.images.rename(tmp_path / "coco" / "val2017")
    scenes.json.rename(tmp_path / "coco" / "annotations" / "instances_val2017.json")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "check_dataset.py"),
            "coco_2017_val",
            "--json",
            str(tmp_path / "out.json"),
        ],
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "coco_2017_val: 2 images, 8 instances" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text()) == []
