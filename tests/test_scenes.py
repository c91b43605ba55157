"""Demo scenes: the same bytes for the same seed, and three layouts that agree with one another."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="scenes are composed of photographs inside the scikit-image wheel")
pytest.importorskip("sklearn", reason="scenes are composed of photographs inside the scikit-learn wheel")

from pycocotools.coco import COCO

from mae_transfer.cutouts import OBJECTS, cutouts
from mae_transfer.errors import DataError, run_tool
from mae_transfer.scenes import CLASSES, LEAST_SCENES, VISIBLE_FRACTION, compose, main, write_scenes

SMALL = {"size": (96, 128), "num_unlabelled": 4, "num_train": 5, "num_val": 4, "seed": 3}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "out", **SMALL)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_however_many_processes(scenes: Path, tmp_path: Path) -> None:
    # Another process, and worker processes of its own: nothing may depend on hash seeds or on the order of work.
    command = [sys.executable, "tools/make_scenes.py", "--out", str(tmp_path / "again"), "--size", "96", "128"]
    command += ["--unlabelled", "4", "--train", "5", "--val", "4", "--seed", "3", "--workers", "2"]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "again") == digests(scenes)


def test_another_seed_or_split_gives_another_scene() -> None:
    first = compose(size=(64, 64), seed=0, split="train", index=0)
    for other in (
        compose(size=(64, 64), seed=1, split="train", index=0),
        compose(size=(64, 64), seed=0, split="val", index=0),
        compose(size=(64, 64), seed=0, split="train", index=4),
    ):
        assert np.abs(np.asarray(first.image, dtype=float) - np.asarray(other.image, dtype=float)).mean() > 5


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_boxes_and_areas_are_those_of_the_masks(scenes: Path, split: str) -> None:
    coco = COCO(scenes / "coco" / "annotations" / f"instances_{split}.json")
    assert {category["name"] for category in coco.loadCats(coco.getCatIds())} == set(OBJECTS)
    seen = set()
    for image_id in coco.getImgIds():
        info = coco.loadImgs(image_id)[0]
        with Image.open(scenes / "coco" / split / info["file_name"]) as image:
            assert image.size == (info["width"], info["height"]) == (128, 96)
        covered = np.zeros((96, 128), dtype=int)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id)):
            mask = coco.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert annotation["area"] == mask.sum() > 0
            assert annotation["iscrowd"] == 0
            covered += mask
            seen.add(annotation["category_id"])
        assert covered.max() <= 1  # visible masks: a pixel belongs to one object
    assert seen == set(coco.getCatIds())


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_ade_labels_are_in_range_complete_and_agree_with_coco(scenes: Path, split: str, folder: str) -> None:
    coco = COCO(scenes / "coco" / "annotations" / f"instances_{split}.json")
    assert (scenes / "ade" / "classes.txt").read_text().splitlines() == list(CLASSES)
    seen: set[int] = set()
    for image_id in coco.getImgIds():
        name = Path(coco.loadImgs(image_id)[0]["file_name"]).stem
        with Image.open(scenes / "ade" / "annotations" / folder / f"{name}.png") as image:
            assert image.mode == "L"  # an index, not a colour
            labels = np.asarray(image)
        assert labels.shape == (96, 128)
        assert labels.max() <= len(CLASSES)
        assert (labels == 0).mean() < 0.2  # only the rims of objects are unlabelled
        seen |= set(np.unique(labels).tolist())
        objects = np.zeros_like(labels)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id)):
            objects[coco.annToMask(annotation) > 0] = annotation["category_id"]
        labelled = labels > 0
        is_object = labels <= len(OBJECTS)
        assert np.array_equal(labels[labelled & is_object], objects[labelled & is_object])
        assert (objects[labelled & ~is_object] == 0).all()
        photo = (scenes / "ade" / "images" / folder / f"{name}.jpg").read_bytes()
        assert photo == (scenes / "coco" / split / f"{name}.jpg").read_bytes()
    assert seen == set(range(len(CLASSES) + 1))


def test_objects_stay_visible_and_inside() -> None:
    for index in range(8):
        scene = compose(size=(96, 96), seed=5, split="val", index=index)
        assert len(scene.instances) >= 2
        smallest = min(instance.mask.sum() for instance in scene.instances)
        assert smallest >= VISIBLE_FRACTION * 12  # a coin at the far end is a few pixels, not none


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_object_has_a_picture_of_its_own_in_the_folder_of_its_class(scenes: Path, split: str) -> None:
    coco = COCO(scenes / "coco" / "annotations" / f"instances_{split}.json")
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    found = 0
    for image_id in coco.getImgIds():
        info = coco.loadImgs(image_id)[0]
        with Image.open(scenes / "coco" / split / info["file_name"]) as image:
            scene = np.asarray(image.convert("RGB")).astype(int)
        for number, annotation in enumerate(coco.loadAnns(coco.getAnnIds(imgIds=image_id))):
            folder = scenes / "classes" / split / names[annotation["category_id"]]
            with Image.open(folder / f"{Path(info['file_name']).stem}_{number}.jpg") as image:
                own = np.asarray(image.convert("RGB")).astype(int)
            x, y, width, height = annotation["bbox"]
            side = own.shape[0]
            assert own.shape == (side, side, 3) and side >= min(max(width, height), 96)  # images are 96 high
            # It is the scene around the middle of the object's box, but for what JPEG loses twice.
            left = min(max(round(x + width / 2 - side / 2), 0), 128 - side)
            top = min(max(round(y + height / 2 - side / 2), 0), 96 - side)
            assert np.abs(own - scene[top : top + side, left : left + side]).mean() < 8
            found += 1
    assert found == len(list((scenes / "classes" / split).rglob("*.jpg"))) > 0


def test_every_object_is_a_photograph_not_a_flat_shape() -> None:
    for category in OBJECTS:
        for cut in cutouts(category):
            pixels = np.asarray(cut, dtype=float)
            inside = pixels[pixels[..., 3] > 200][:, :3]
            assert inside.std(axis=0).mean() > 10  # gray values out of 255


def test_bad_input_is_refused_in_words(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="not empty"):
        write_scenes(scenes, **SMALL)
    with pytest.raises(DataError, match=f"at least {LEAST_SCENES}"):
        write_scenes(tmp_path / "few", num_val=1)
    with pytest.raises(DataError, match="at least 64"):
        write_scenes(tmp_path / "tiny", size=(32, 200))
    assert not list(tmp_path.iterdir())
    assert run_tool(main, ["--out", str(scenes)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_an_interrupted_run_leaves_no_half_data_set(tmp_path: Path) -> None:
    def interrupt(scenes, total):
        yield next(iter(scenes))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "out", **SMALL, progress=interrupt)
    assert not (tmp_path / "out").exists()
    write_scenes(tmp_path / "out", **SMALL)
    assert json.loads((tmp_path / "out" / "coco" / "annotations" / "instances_val.json").read_text())["annotations"]
    assert not (tmp_path / "out.part").exists()
