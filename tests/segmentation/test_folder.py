"""ADE-layout folders: what is read, and what each mistake is called."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS
from PIL import Image

from mae_transfer.errors import ConfigError, DataError, UserError
from mae_transfer.segmentation.config import load_config
from mae_transfer.segmentation.dataset import ADEFolder, ReplaySampler
from mae_transfer.segmentation.folder import (
    check_folder,
    check_labels,
    find_pairs,
    read_classes,
    read_mask,
    reduce_labels,
)


def check(root: Path, *, num_classes: int = 4, reduce_zero_label: bool = False) -> str:
    return check_folder(root, split="training", num_classes=num_classes, reduce_zero_label=reduce_zero_label)


def a_mask(root: Path) -> Path:
    return root / "annotations/training/scene_1.png"


def edit(path: Path, change) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def test_a_good_folder(make_folder) -> None:
    assert check(make_folder()).startswith("training: 4 images, 4 of 4 classes occur, 0.0%")
    line = check(make_folder(zero=True, name="zero"), reduce_zero_label=True)
    assert line.startswith("training: 4 images, 4 of 4 classes occur, 0.0%")


def test_flat_images_with_split_annotations(make_folder) -> None:
    root = make_folder()
    for path in (root / "images").glob("*/*.png"):
        shutil.move(path, root / "images" / f"{path.parent.name}_{path.name}")
    for path in list((root / "annotations").glob("*/*.png")):
        path.rename(path.with_name(f"{path.parent.name}_{path.name}"))
    shutil.rmtree(root / "images/training")
    shutil.rmtree(root / "images/validation")
    assert len(find_pairs(root, "training")) == 4
    assert all(pair.image.stem == pair.mask.stem for pair in find_pairs(root, "validation"))


def test_palette_masks_give_indices_and_jpeg_images_pair(make_folder) -> None:
    root = make_folder()
    image = root / "images/training/scene_1.png"
    Image.open(image).save(image.with_suffix(".JPG"), format="JPEG")
    image.unlink()
    labels = np.array(Image.open(a_mask(root)))
    palette = Image.fromarray(labels, mode="P")
    palette.putpalette([9, 9, 9] * 256)
    palette.save(a_mask(root))
    np.testing.assert_array_equal(read_mask(a_mask(root)), labels)
    check(root)


def test_exif_rotated_images_are_measured_as_displayed(make_folder) -> None:
    root = make_folder(size=(48, 80))
    path = root / "images/training/scene_1.png"
    turned = Image.open(path).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 clockwise to display"
    path.unlink()
    turned.save(path.with_suffix(".jpg"), exif=exif)
    check(root)


MISTAKES = {
    "missing root": (lambda root: shutil.rmtree(root), "is not a folder"),
    "missing annotations": (lambda root: shutil.rmtree(root / "annotations/training"), "no annotations/training"),
    "missing images": (lambda root: shutil.rmtree(root / "images"), "neither images/training/ nor images/"),
    "no images": (lambda root: [path.unlink() for path in (root / "images/training").iterdir()], "no images in"),
    "no masks": (lambda root: [path.unlink() for path in (root / "annotations/training").iterdir()], "no masks in"),
    "annotation without image": (
        lambda root: (root / "images/training/scene_2.png").unlink(),
        r"1 annotation \(scene_2\) in .* without an image",
    ),
    "image without annotation": (
        lambda root: (root / "annotations/training/scene_2.png").unlink(),
        r"1 image \(scene_2\) in .* without a mask",
    ),
    "label of no class": (
        lambda root: edit(a_mask(root), lambda labels: np.where(labels == 3, 7, labels)),
        "scene_1.png holds label 7, but the 4 classes are labelled 0 to 3",
    ),
    "another size": (
        lambda root: edit(a_mask(root), lambda labels: labels[:-2]),
        "scene_1.png is 80x62, its image 80x64",
    ),
    "colours": (lambda root: edit(a_mask(root), lambda labels: np.stack([labels] * 3, -1)), "holds colours"),
    "black and white": (
        lambda root: [
            edit(path, lambda labels: np.where(labels > 0, 255, 0).astype(np.uint8))
            for path in (root / "annotations/training").iterdir()
        ],
        "binary mask saved as black and white",
    ),
    "truncated mask": (
        lambda root: a_mask(root).write_bytes(a_mask(root).read_bytes()[:60]),
        "cannot be read",
    ),
    "no image file": (
        lambda root: (root / "images/training/scene_1.png").write_text("hello"),
        "cannot be read",
    ),
    "twice": (
        lambda root: shutil.copy(root / "images/training/scene_1.png", root / "images/training/scene_1.jpg"),
        "two files for scene_1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(make_folder, name: str) -> None:
    root = make_folder()
    breakage, message = MISTAKES[name]
    breakage(root)
    with pytest.raises(DataError, match=message):
        check(root)


def test_reducing_the_zero_label() -> None:
    stored = np.array([[0, 1, 4, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(reduce_labels(stored), [[255, 0, 3, 255]])
    check_labels(stored, "m.png", num_classes=4, reduce_zero_label=True)
    with pytest.raises(DataError, match=r"train with dataset\.reduce_zero_label=True"):
        check_labels(stored, "m.png", num_classes=4, reduce_zero_label=False)


def test_classes_from_txt_json_and_masks(make_folder, tmp_path) -> None:
    root = make_folder(zero=True)
    splits = ("training", "validation")
    names = ["ground", "red", "green", "blue"]
    assert read_classes(root, None, splits=splits, reduce_zero_label=True) == names
    listed = tmp_path / "names.json"
    listed.write_text(json.dumps(names[::-1]))
    assert read_classes(root, str(listed), splits=splits, reduce_zero_label=True) == names[::-1]
    (root / "classes.txt").unlink()
    assert read_classes(root, None, splits=splits, reduce_zero_label=True) == [f"class {i}" for i in (1, 2, 3, 4)]
    assert read_classes(root, None, splits=splits, reduce_zero_label=False) == [f"class {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "holds no list of names"),
        ("a.txt", " \n", "names no class"),
        ("a.txt", "car\ncar\n", "names a class twice: car"),
    ],
)
def test_wrong_class_lists(make_folder, tmp_path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(make_folder(), str(path), splits=("training",), reduce_zero_label=False)


# Draws


def augmented(root: Path) -> ADEFolder:
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadIndexMask"},
        {"type": "RandomResize", "scale": (160, 64), "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (32, 32), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
    ]
    with DefaultScope.overwrite_default_scope("mmseg"):
        return ADEFolder(
            root=str(root), split="training", classes=("a", "b", "c", "d"), reduce_zero_label=False, pipeline=pipeline
        )


def test_a_draw_repeats_whatever_happened_before(make_folder) -> None:
    dataset = augmented(make_folder())
    draws = list(islice(ReplaySampler(dataset, seed=5), 12))
    images = [dataset[draw]["img"] for draw in draws]
    np.random.default_rng().random(7)
    skipped = ReplaySampler(dataset, seed=5)
    skipped.skip(8)
    for draw, image in zip(islice(skipped, 4), images[8:], strict=True):
        np.testing.assert_array_equal(dataset[pickle.loads(pickle.dumps(draw))]["img"], image)  # noqa: S301


def test_draws_do_not_depend_on_the_number_of_processes(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = augmented(make_folder())
    alone = [(int(draw), draw.seed) for draw in islice(ReplaySampler(dataset, seed=5), 12)]
    shared = []
    for rank in range(3):
        monkeypatch.setattr("mae_transfer.segmentation.dataset.get_dist_info", lambda rank=rank: (rank, 3))
        shared.append([(int(draw), draw.seed) for draw in islice(ReplaySampler(dataset, seed=5), 4)])
    assert [shared[position % 3][position // 3] for position in range(12)] == alone


def test_every_epoch_holds_every_image_once_in_another_order(make_folder) -> None:
    dataset = augmented(make_folder(num_train=8))
    drawn = list(islice(ReplaySampler(dataset, seed=1), 24))
    epochs = [drawn[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({draw.seed for draw in drawn}) == 24


def test_augmentation_leaves_the_global_random_numbers_alone(make_folder) -> None:
    dataset = augmented(make_folder())
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    dataset[next(iter(ReplaySampler(dataset, seed=1)))]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_share_of_the_training_images(make_folder, tmp_path) -> None:
    config = tmp_path / "config.py"
    config.write_text("dataset = {}\nencoder = {'size': 'tiny'}\n", encoding="utf-8")

    def images(fraction: float, seed: int, which: str = "train") -> set[str]:
        options = {"dataset.root": str(root), "dataset.fraction": fraction, "dataset.fraction_seed": seed}
        derived = load_config(config, options, work_dir=str(tmp_path / "run"))
        with DefaultScope.overwrite_default_scope("mmseg"):
            dataset = DATASETS.build(derived[f"{which}_dataloader"].dataset)
        return {entry["img_path"] for entry in dataset.load_data_list()}

    root = make_folder(num_train=8)
    assert len(images(1.0, 0)) == 8
    assert len(images(0.25, 0)) == 2
    assert images(0.25, 0) < images(0.5, 0)
    assert len({frozenset(images(0.25, seed)) for seed in range(4)}) > 1
    assert images(0.25, 0, "val") == images(1.0, 0, "val")
    with pytest.raises(ConfigError, match=r"dataset\.fraction=0"):
        images(0, 0)
