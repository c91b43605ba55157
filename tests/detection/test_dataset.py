"""COCO files as people have them: ids with gaps, crowds, polygons that are none, images of every kind, and errors."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from PIL import Image

from mae_transfer.data.sampler import SampleKey
from mae_transfer.detection.augment import Augmentation
from mae_transfer.detection.config import build_augmentation, load_config, resolve
from mae_transfer.detection.dataset import load_coco, read_categories
from mae_transfer.detection.evaluation import score
from mae_transfer.detection.loader import EvaluationMapper, TrainingSamples, read_rgb
from mae_transfer.detection.train import load_data
from mae_transfer.errors import ConfigError, DataError

TINY = Path(__file__).resolve().parents[2] / "configs" / "detection" / "tiny.py"


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=3, side=48)


def load(scenes: Any) -> Any:
    scenes.write()
    return load_coco(scenes.json, scenes.images)


def test_classes_are_numbered_by_category_id(scenes: Any) -> None:
    dataset = load(scenes)
    assert [(c.id, c.name) for c in dataset.categories] == [(3, "box"), (7, "disc")]
    assert read_categories(scenes.json) == dataset.categories
    for record in dataset.records:
        truth = [a for a in scenes.content["annotations"] if a["image_id"] == record["image_id"]]
        assert [dataset.categories[a["category_id"]].id for a in record["annotations"]] == [
            a["category_id"] for a in truth
        ]
        for instance, annotation in zip(record["annotations"], truth):
            assert instance["bbox"] == pytest.approx(annotation["bbox"])


def test_category_zero_is_a_category(scenes: Any) -> None:
    scenes.content["categories"] = [{"id": 0, "name": "box"}, {"id": 7, "name": "disc"}]
    for annotation in scenes.content["annotations"]:
        annotation["category_id"] = {3: 0, 7: 7}[annotation["category_id"]]
    assert {a["category_id"] for r in load(scenes).records for a in r["annotations"]} == {0, 1}


def test_rle_makes_masks_bitmaps_and_polygons_alone_do_not(scenes: Any) -> None:
    assert load(scenes).mask_format == "bitmask"
    scenes.content["annotations"] = [a for a in scenes.content["annotations"] if a["category_id"] == 3]
    assert load(scenes).mask_format == "polygon"


def test_images_without_instances_are_evaluated_but_not_trained_on(scenes: Any) -> None:
    first = scenes.content["images"][0]["id"]
    for annotation in scenes.content["annotations"]:
        if annotation["image_id"] == first:
            annotation["iscrowd"] = 1
    dataset = load(scenes)
    assert len(dataset.records) == 3
    assert [r["image_id"] for r in dataset.with_instances().records] == [10, 20]


def test_at_most_filters_what_is_predicted_and_what_is_compared_with(scenes: Any) -> None:
    Image.new("RGB", (64, 48)).save(scenes.images / "001.png")
    scenes.content["images"][1].update(height=48, width=64)
    for annotation in scenes.content["annotations"]:
        if isinstance(annotation["segmentation"], dict) and annotation["image_id"] == 10:
            annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    small = load(scenes).at_most(48)
    assert [r["image_id"] for r in small.records] == [0, 20] == [i["id"] for i in small.json_dict["images"]]
    assert {a["image_id"] for a in small.json_dict["annotations"]} == {0, 20}
    with pytest.raises(DataError, match="at most 10 pixels"):
        small.at_most(10)


def test_a_part_is_chosen_by_seed_and_ids_alone_and_parts_are_nested(make_scenes: Callable[..., Any]) -> None:
    scenes = make_scenes(num_images=40, side=24, num_instances=1)

    def chosen(fraction: float, seed: int = 0) -> set[int]:
        part = load(scenes).part(fraction, seed=seed)
        ids = {r["image_id"] for r in part.records}
        assert ids == {image["id"] for image in part.json_dict["images"]}
        assert ids == {a["image_id"] for a in part.json_dict["annotations"]}
        return ids

    quarter, half = chosen(0.25), chosen(0.5)
    assert (len(quarter), len(half), len(chosen(1.0)), len(chosen(0.001))) == (10, 20, 40, 1)
    assert quarter < half
    assert chosen(0.25, seed=1) != quarter
    for key in ("images", "annotations"):
        scenes.content[key].reverse()
    assert chosen(0.25) == quarter
    for fraction in (0, 1.5, -1, float("nan")):
        with pytest.raises(ConfigError, match=r"dataset\.train\.fraction"):
            load(scenes).part(fraction, seed=0)


def test_images_without_instances_can_be_trained_on(make_scenes: Callable[..., Any]) -> None:
    scenes = make_scenes(num_images=2, side=64, num_instances=2)
    scenes.content["annotations"] = [a for a in scenes.content["annotations"] if a["image_id"] == 0]
    scenes.write()
    overrides = [*scenes.overrides, "dataset.train.keep_empty=true", "dataset.image_size=64"]
    cfg = resolve(load_config(TINY, overrides))
    kept, _ = load_data(cfg, training=True)
    assert kept is not None
    assert [len(record["annotations"]) for record in kept.records] == [2, 0]
    samples = TrainingSamples(kept, build_augmentation(cfg), seed=0)
    model = instantiate(cfg.model)
    with EventStorage():
        for batch in ([0, 1], [1, 1]):
            losses = model([samples[SampleKey(0, index)] for index in batch])
            assert all(loss.isfinite() for loss in losses.values())
            sum(losses.values()).backward()


def test_training_data_are_the_part_asked_for(make_scenes: Callable[..., Any]) -> None:
    scenes = make_scenes(num_images=8, side=24, num_instances=1)
    overrides = [*scenes.overrides, "dataset.train.fraction=0.25", "dataset.train.fraction_seed=3"]
    train_set, val = load_data(resolve(load_config(TINY, overrides)), training=True)
    assert train_set is not None
    assert val is not None
    assert (len(train_set.records), len(val.records)) == (2, 8)
    assert train_set.records == load(scenes).part(0.25, seed=3).records


def test_outlines_that_are_none_are_left_out_of_training_and_of_evaluation(
    scenes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scenes.content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
    scenes.content["annotations"][1]["segmentation"] = [[5, 5, 5, 9, 5, 12]]
    dataset = load(scenes)
    assert len(dataset.records[0]["annotations"]) == 2
    assert {1, 2}.isdisjoint(a["id"] for a in dataset.json_dict["annotations"])
    assert "left out: image 0 (000.png), annotation 1: outline that has fewer than three points" in caplog.text
    assert "left out: image 0 (000.png), annotation 2: outline that encloses no area" in caplog.text


def test_uncompressed_rle_is_read(scenes: Any) -> None:
    scenes.content["annotations"][0]["segmentation"] = {"size": [48, 48], "counts": [0, 4, 48 * 48 - 4]}
    assert load(scenes).records[0]["annotations"][0]["bbox"] == [0, 0, 1, 4]


def _break(scenes: Any, how: str) -> None:
    content = scenes.content
    if how == "no such json":
        scenes.json.unlink()
    elif how == "no json":
        scenes.json.write_text('{"images": [')
    elif how == "a list":
        scenes.json.write_text("[]")
    elif how == "no annotations":
        del content["annotations"]
    elif how == "image twice":
        content["images"].append(content["images"][0])
    elif how == "category twice":
        content["categories"] = [content["categories"][0]] * 2
    elif how == "foreign image":
        content["annotations"][0]["image_id"] = 999
    elif how == "foreign category":
        content["annotations"][0]["category_id"] = 5
    elif how == "no outline":
        del content["annotations"][0]["segmentation"]
    elif how == "image gone":
        (scenes.images / "001.png").unlink()
    elif how == "wrong rle size":
        content["annotations"][0]["segmentation"] = {"size": [10, 10], "counts": "abc"}
    elif how == "no height":
        del content["images"][0]["height"]
    if how not in ("no such json", "no json", "a list"):
        scenes.write()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no such json", "does not exist"),
        ("no json", "not readable as json"),
        ("a list", "holds a list"),
        ("no annotations", "no list of annotations"),
        ("image twice", "image id 0 is given twice"),
        ("category twice", "given twice"),
        ("foreign image", "image 999"),
        ("foreign category", "category 5"),
        ("no outline", "has no segmentation"),
        ("image gone", "image 10: missing image file: .*001.png is not there"),
        ("wrong rle size", "its image is"),
        ("no height", "lacks height"),
    ],
)
def test_broken_data_is_named(scenes: Any, how: str, message: str) -> None:
    _break(scenes, how)
    with pytest.raises(DataError, match=message):
        load_coco(scenes.json, scenes.images)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_stands_in_a_json_is_data_or_an_error_of_ours(scenes: Any, seed: int) -> None:
    """A few values anywhere in the file are replaced, removed or doubled at random."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        node: Any = scenes.content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.1:
                break
            node = node[key]
        how = rng.random()
        if how < 0.1:
            del node[key]
        elif how < 0.2 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    scenes.write()
    try:
        dataset = load_coco(scenes.json, scenes.images)
    except DataError:
        return
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in dataset.json_dict["annotations"]
    ]
    assert 0 <= score(dataset, results, "bbox", max_dets=100)["AR"] <= 100 or not results
    score(dataset, [], "segm", max_dets=100)
    samples = TrainingSamples(dataset, Augmentation(image_size=32, resize="native"), seed=0)
    for index in range(len(samples)):
        samples[SampleKey(0, index)]


ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**70, 1e300, float("nan"), float("-inf"), 0.5, "", "7", "a\0b", "é", "../../x"),
    *([], {}, [[]], [None], [[1, 2, 3, 4, 5, 6]], [1, 2, 3, 4], {"size": [48, 48], "counts": "0"}, {"id": 1}),
]


def test_validation_must_number_the_same_categories(scenes: Any) -> None:
    trained = load(scenes).categories
    scenes.content["categories"][0]["name"] = "ring"
    scenes.write()
    with pytest.raises(DataError, match="'ring', in the training json it is 'disc'"):
        load_coco(scenes.json, scenes.images, categories=trained)


def test_image_folder_must_exist(scenes: Any) -> None:
    with pytest.raises(DataError, match="image folder"):
        load_coco(scenes.json, scenes.images / "none")


def _saved(kind: str, path: Path) -> Path:
    """A left half of about (200, 100, 50), stored in every way that comes along."""
    rgb = np.zeros((8, 12, 3), dtype=np.uint8)
    rgb[:, :6] = (200, 100, 50)
    image = Image.fromarray(rgb)
    if kind == "rgba":
        image.putalpha(128)
    elif kind == "palette":
        image = image.quantize(4)
    elif kind == "gray16":
        image = Image.fromarray(rgb[..., 0].astype(np.uint16) << 8)
    elif kind == "gray":
        image = Image.fromarray(rgb[..., 0])
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "exif":
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 270 degrees to see it upright
        image.save(path, exif=exif, quality=100)
        return path
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("rgb", "png"),
        ("rgba", "png"),
        ("palette", "png"),
        ("gray", "png"),
        ("gray16", "png"),
        ("cmyk", "tif"),
        ("exif", "jpg"),
    ],
)
def test_any_image_is_read_as_upright_rgb(kind: str, ending: str, tmp_path: Path) -> None:
    path = _saved(kind, tmp_path / f"image.{ending}")
    image = read_rgb({"file_name": str(path), "height": 8, "width": 12})
    expected = (200, 200, 200) if kind.startswith("gray") else (200, 100, 50)
    assert image.shape == (8, 12, 3)
    assert abs(image[4, 2].astype(int) - expected).max() <= 4
    assert image[4, 10].max() <= 4


def test_an_image_of_another_size_than_its_json_says_is_an_error(tmp_path: Path) -> None:
    path = _saved("rgb", tmp_path / "image.png")
    with pytest.raises(DataError, match=r"12x8 pixels .* its json says 8x12"):
        read_rgb({"file_name": str(path), "height": 12, "width": 8})


def test_the_network_gets_rgb_of_0_to_255(tmp_path: Path) -> None:
    path = _saved("rgb", tmp_path / "image.png")
    mapped = EvaluationMapper(Augmentation(image_size=32, resize="native"))({"file_name": str(path)})
    assert mapped["image"].shape == (3, 8, 12)
    assert mapped["image"][:, 4, 2].tolist() == [200, 100, 50]
    assert (mapped["height"], mapped["width"]) == (8, 12)


def test_json_is_not_changed_by_reading(scenes: Any) -> None:
    before = json.dumps(scenes.content)
    assert json.dumps(load(scenes).json_dict) == before
