"""Folders in ADE20K's layout: what is paired, what classes they have, and what is said of what is in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_transfer.errors import ConfigError, DataError, UserError
from mae_transfer.segmentation.check import check_folder, check_split
from mae_transfer.segmentation.settings import DatasetSettings, read_settings
from mae_transfer.segmentation.source import Split, class_names, class_palette, splits_of

from .conftest import CLASSES


def training(root: Path, **options: Any) -> Split:
    return Split(**{"root": str(root), "split": "training", "reduce_zero_label": False, **options})


def check(root: Path, **options: Any) -> str:
    return check_folder(training(root, **options), CLASSES)


def test_a_good_folder(make_folder) -> None:
    assert check(make_folder()).startswith("training: 4 images, 4 of 4 classes occur, 0.0%")
    line = check(make_folder(zero=True, name="zero"), reduce_zero_label=True)
    assert line.startswith("training: 4 images, 4 of 4 classes occur, 0.0%")


def test_pixels_are_counted_by_class(make_folder) -> None:
    root = make_folder()
    path = root / "annotations/training/scene_0.png"
    labels = np.array(Image.open(path))
    labels[:10] = 255
    Image.fromarray(labels).save(path)
    masks = [np.array(Image.open(path)) for path in sorted((root / "annotations/training").iterdir())]
    report = check_split(training(root), CLASSES)
    values = np.concatenate([mask.ravel() for mask in masks])
    assert report.pixels.tolist() == [(values == label).sum() for label in (0, 1, 2, 3, 255)]
    assert report.images.tolist() == [sum((mask == label).any() for mask in masks) for label in range(4)]
    assert not report.problems
    assert f"red        {(values == 1).mean():8.3%} in {report.images[1]} images" in report.table()


def test_a_zero_label_that_may_be_a_class_is_said(make_folder) -> None:
    assert "label 4 (blue) does not occur, and 0 is taken for unlabelled" in check(
        make_folder(), reduce_zero_label=True
    )
    assert "taken for" not in check(make_folder(zero=True, name="zero"), reduce_zero_label=True)


def test_flat_images_with_split_annotations(make_folder) -> None:
    root = make_folder()
    for path in (root / "images").glob("*/*.png"):
        shutil.move(path, root / "images" / f"{path.parent.name}_{path.name}")
    for path in list((root / "annotations").glob("*/*.png")):
        path.rename(path.with_name(f"{path.parent.name}_{path.name}"))
    shutil.rmtree(root / "images/training")
    shutil.rmtree(root / "images/validation")
    assert len(training(root).pairs()) == 4
    assert [pair.name for pair in training(root, split="validation").pairs()] == [
        f"validation_scene_{i}" for i in (0, 1)
    ]


def test_only_some_masks_are_looked_at_before_training(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_transfer.segmentation.check.MAX_CHECKED_MASKS", 2)
    root = make_folder()
    assert check(root).endswith("(pixels of 2 masks looked at)")
    path = root / "annotations/training/scene_1.png"
    Image.fromarray(np.full((64, 80), 9, np.uint8)).save(path)
    check(root)
    Image.fromarray(np.zeros((62, 80), np.uint8)).save(path)
    with pytest.raises(UserError, match=r"scene_1.png: mask of another size than its image: it is 80x62"):
        check(root)


# Classes


def names(root: Path, classes: str | Path | None = None, **options: Any) -> tuple[str, ...]:
    splits = [training(root, **{"split": split, **options}) for split in ("training", "validation")]
    return class_names(splits, None if classes is None else str(classes))


def test_classes_from_txt_json_and_masks(make_folder, tmp_path: Path) -> None:
    root = make_folder(zero=True)
    assert names(root) == CLASSES
    listed = tmp_path / "names.json"
    listed.write_text(json.dumps(CLASSES[::-1]))
    assert names(root, listed) == CLASSES[::-1]
    listed.write_text(json.dumps([{"label": 1, "name": "ground", "colour": [1, 2, 3]}, {"label": 2, "name": "red"}]))
    assert names(root, listed) == ("ground", "red")
    (root / "classes.txt").unlink()
    assert names(root, reduce_zero_label=True) == tuple(f"class {label}" for label in (1, 2, 3, 4))
    assert names(root) == tuple(f"class {label}" for label in range(5))
    assert names(root, masks="binary") == ("background", "foreground")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "holds no list of names"),
        ("a.json", '["car", 3]', "holds no list of names"),
        ("a.txt", " \n", "names no class"),
        ("a.txt", "car\ncar\n", "names a class twice: car"),
        ("a.txt", "\n".join(f"c{number}" for number in range(256)), "names 256 classes; masks have room for 255"),
        ("a.txt", b"\xff\xfe\x00", "is no text in UTF-8"),
        ("b.txt", None, "b.txt does not exist"),
    ],
)
def test_wrong_class_lists(make_folder, tmp_path: Path, name: str, text: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        names(make_folder(), path)


def test_masks_without_a_class(make_folder) -> None:
    root = make_folder(num_train=1, num_val=1)
    (root / "classes.txt").unlink()
    for path in (root / "annotations").glob("*/*.png"):
        Image.fromarray(np.full((64, 80), 255, np.uint8)).save(path)
    with pytest.raises(ConfigError, match=r"hold no label but 255; .* leaves no class"):
        names(root)


def test_a_palette_for_every_class(make_folder, tmp_path: Path) -> None:
    root = make_folder()
    made = class_palette(training(root), CLASSES)
    assert len(set(made)) == 4
    table = tmp_path / "colours.txt"
    table.write_text("1 2 3 ground\n4 5 6 red\n7 8 9 green\n10 11 12 blue\n0 0 0 void\n")
    coloured = training(root, masks="colours", colours=str(table))
    assert class_palette(coloured, CLASSES) == ((1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))


# What settings leave open


@pytest.mark.parametrize(
    ("given", "reduce", "masks"),
    [
        ({}, True, "auto"),
        ({"reduce_zero_label": False}, False, "auto"),
        ({"masks": "index"}, True, "index"),
        ({"masks": "binary"}, False, "binary"),
        ({"colours": "table.txt"}, False, "colours"),
    ],
)
def test_what_is_derived(given: dict[str, Any], reduce: bool, masks: str) -> None:
    train, val = splits_of(DatasetSettings(root="mine", **given))
    assert (train.reduce_zero_label, train.masks, train.name, train.root) == (reduce, masks, None, "mine")
    assert (train.split, val.split) == ("training", "validation")


def test_where_nothing_is_said_it_is_ade20k() -> None:
    train, _ = splits_of(DatasetSettings())
    assert (train.name, train.root, train.reduce_zero_label) == ("ade20k", "data/ade/ADEChallengeData2016", True)
    own, _ = splits_of(DatasetSettings(classes="mine.txt"))  # enough to predict with, as a released model's names
    with pytest.raises(DataError, match=r"dataset\.root is not given"):
        own.scan()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "cityscapes", "classes": "a.txt"}, "dataset.classes is given, but cityscapes brings its own"),
        ({"name": "cityscapes", "reduce_zero_label": True}, "is not how cityscapes is evaluated"),
        ({"name": "voc2012", "masks": "index"}, "how masks of voc2012 are stored is known"),
        ({"reduce_zero_label": False}, r"not how ade20k is evaluated; give dataset\.root"),
        ({"root": "x", "masks": "colours"}, "needs dataset.colours"),
        ({"root": "x", "masks": "index", "colours": "a.txt"}, "has no meaning under dataset.masks=index"),
        ({"root": "x", "masks": "binary", "reduce_zero_label": True}, "black is a class"),
        ({"root": "x", "colours": "a.txt", "reduce_zero_label": True}, "leave the unlabelled colour out"),
    ],
)
def test_settings_that_contradict_one_another(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        splits_of(DatasetSettings(**given))


@pytest.mark.parametrize("key", ["name", "masks", "mask_size"])
def test_words_that_mean_nothing(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\.{key} is 'cityscape'; expected one of"):
        read_settings({"dataset": {key: "cityscape"}})
