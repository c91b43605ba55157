"""Published data sets: a miniature of each layout, read as MMSegmentation's own data set class reads it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mmseg
import mmseg.datasets
import numpy as np
import pytest
from mmengine.registry import DefaultScope
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS
from PIL import Image

from mae_transfer.check_dataset import main as check
from mae_transfer.errors import DataError, run_tool
from mae_transfer.segmentation.config import load_config
from mae_transfer.segmentation.dataset import LabelledImages
from mae_transfer.segmentation.masks import IGNORE
from mae_transfer.segmentation.names import PUBLISHED
from mae_transfer.segmentation.settings import DatasetSettings
from mae_transfer.segmentation.source import class_names, splits_of

TINY = Path(__file__).resolve().parents[2] / "configs" / "segmentation" / "upernet_tiny.py"
SIZE = (6, 200)  # room for every class in one mask


def write(root: Path, image: str, mask: str, numbers: np.ndarray) -> None:
    for name, array in ((image, np.zeros((*SIZE, 3), np.uint8)), (mask, numbers.astype(np.uint8))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / name)


def some(values: list[int], seed: int) -> np.ndarray:
    """Every one of the values, in some order."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.resize(values, SIZE[0] * SIZE[1])).reshape(SIZE)


def listed(root: Path, where: str, names: list[str]) -> None:
    (root / where).parent.mkdir(parents=True, exist_ok=True)
    (root / where).write_text("\n".join(names) + "\n")


def ade20k(root: Path) -> None:
    for split in ("training", "validation"):
        for name in ("ADE_1", "ADE_2"):
            write(root, f"images/{split}/{name}.jpg", f"annotations/{split}/{name}.png", some(list(range(151)), 1))


def cityscapes(root: Path, ending: str = "labelTrainIds", values: tuple[int, ...] = (*range(19), 255)) -> None:
    for split in ("train", "val"):
        for name in ("aachen/aachen_0_1", "bonn/bonn_0_2"):
            files = f"leftImg8bit/{split}/{name}_leftImg8bit.png", f"gtFine/{split}/{name}_gtFine_{ending}.png"
            write(root, *files, some(list(values), 2))
            other = root / f"gtFine/{split}/{name}_gtFine_color.png"
            Image.new("RGB", SIZE[::-1]).save(other)


def voc(root: Path, masks: str = "SegmentationClass", lists: str = "Segmentation", last: int = 20) -> None:
    for name in ("2007_1", "2007_2", "2007_3", "2007_4"):
        write(root, f"JPEGImages/{name}.jpg", f"{masks}/{name}.png", some([*range(last + 1), 255], 3))
    write(root, "JPEGImages/2007_5.jpg", f"{masks}/2007_5.png", some([0], 3))  # in no list
    listed(root, f"ImageSets/{lists}/train.txt", ["2007_1", "2007_2"])
    listed(root, f"ImageSets/{lists}/val.txt", ["2007_3", "2007_4"])


def voc_aug(root: Path) -> None:
    voc(root)
    write(root, "JPEGImages/2008_1.jpg", "SegmentationClassAug/2008_1.png", some(list(range(21)), 4))
    listed(root, "ImageSets/Segmentation/aug.txt", ["2008_1"])


def context(root: Path) -> None:
    voc(root, "SegmentationClassContext", "SegmentationContext", 59)


def coco_stuff(root: Path, splits: tuple[str, ...], ending: str, values: list[int]) -> None:
    for split in splits:
        for name in ("000000000009", "000000000025"):
            write(root, f"images/{split}/{name}.jpg", f"annotations/{split}/{name}{ending}.png", some(values, 5))


def coco_stuff164k(root: Path) -> None:
    coco_stuff(root, ("train2017", "val2017"), "_labelTrainIds", [*range(171), 255])


def coco_stuff10k(root: Path) -> None:
    coco_stuff(root, ("train2014", "test2014"), "_labelTrainIds", list(range(172)))


LAYOUTS: dict[str, tuple[Callable[[Path], None], tuple[str, str], tuple[str, str], bool]] = {
    # how it is written, (images, masks) of training, (lists) of training and validation, whether by lists
    "ade20k": (ade20k, ("images/training", "annotations/training"), ("", ""), False),
    "cityscapes": (cityscapes, ("leftImg8bit/train", "gtFine/train"), ("", ""), False),
    "voc2012": (voc, ("JPEGImages", "SegmentationClass"), ("Segmentation/train", "Segmentation/val"), True),
    "pascal_context": (
        context,
        ("JPEGImages", "SegmentationClassContext"),
        ("SegmentationContext/train", "SegmentationContext/val"),
        True,
    ),
    "pascal_context_59": (
        context,
        ("JPEGImages", "SegmentationClassContext"),
        ("SegmentationContext/train", "SegmentationContext/val"),
        True,
    ),
    "coco_stuff164k": (coco_stuff164k, ("images/train2017", "annotations/train2017"), ("", ""), False),
    "coco_stuff10k": (coco_stuff10k, ("images/train2014", "annotations/train2014"), ("", ""), False),
}


def ours(root: Path, name: str, which: int = 0) -> LabelledImages:
    splits = splits_of(DatasetSettings(name=name, root=str(root)))
    pipeline = [{"type": "LoadPicture"}, {"type": "LoadLabels"}]
    with DefaultScope.overwrite_default_scope("mmseg"):
        return LabelledImages(
            **asdict(splits[which]),
            classes=class_names(splits, None),
            pipeline=pipeline,
            serialize_data=False,  # which would collect garbage for half a second
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_classes_and_labels_are_mmsegs(name: str, tmp_path: Path) -> None:
    writer, (images, masks), lists, by_list = LAYOUTS[name]
    writer(tmp_path)
    published = PUBLISHED[name]
    kind = getattr(mmseg.datasets, published.known_as)
    more: dict[str, Any] = {"ann_file": f"ImageSets/{lists[0]}.txt"} if by_list else {}
    if published.known_as in ("PascalContextDataset", "PascalContextDataset59", "ADE20KDataset"):
        pass  # its own default of reduce_zero_label
    elif published.reduce_zero_label:
        more["reduce_zero_label"] = True  # as its configs
    theirs = kind(
        data_root=str(tmp_path), data_prefix={"img_path": images, "seg_map_path": masks}, serialize_data=False, **more
    )
    mine = ours(tmp_path, name)
    assert len(mine) == len(theirs) == 2
    for key in ("classes", "palette"):
        assert [list(entry) for entry in mine.metainfo[key]] == [list(entry) for entry in theirs.metainfo[key]]
    assert mine.reduce_zero_label == theirs.reduce_zero_label
    for index in range(2):
        entry = theirs.get_data_info(index)
        sample = mine[index]
        assert (sample["img_path"], sample["seg_map_path"]) == (entry["img_path"], entry["seg_map_path"])
        loaded = LoadAnnotations(imdecode_backend="pillow").transform(dict(entry))
        np.testing.assert_array_equal(sample["gt_seg_map"], loaded["gt_seg_map"])
        assert set(np.unique(sample["gt_seg_map"])) - {IGNORE} == set(range(len(published.classes)))
    assert len(ours(tmp_path, name, which=1)) == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_check_finds_nothing_wrong(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LAYOUTS[name][0](tmp_path)
    assert run_tool(check, [str(tmp_path), "--name", name]) == 0
    printed = capsys.readouterr().out
    count = len(PUBLISHED[name].classes)
    assert f"2 images, {count} of {count} classes occur" in printed
    assert printed.endswith("no problem\n")


def test_the_name_reaches_the_config(tmp_path: Path) -> None:
    voc(tmp_path)
    config = load_config(TINY, {"dataset.name": "voc2012", "dataset.root": str(tmp_path)}, work_dir="run")
    assert config.model.decode_head.num_classes == 21
    for which, split in (("train", "train"), ("val", "val"), ("test", "val")):
        entry = config[f"{which}_dataloader"].dataset
        assert (entry.split, entry.reduce_zero_label) == (split, False)
        with DefaultScope.overwrite_default_scope("mmseg"):
            dataset = DATASETS.build(entry)
        assert len(dataset) == 2
        assert [tuple(colour) for colour in dataset.metainfo["palette"]] == list(PUBLISHED["voc2012"].palette)
    assert [tuple(colour) for colour in config.facts.palette] == list(PUBLISHED["voc2012"].palette)


def test_the_augmented_voc_joins_two_lists_and_two_folders(tmp_path: Path) -> None:
    voc_aug(tmp_path)
    train, val = splits_of(DatasetSettings(name="voc2012_aug", root=str(tmp_path)))
    masks = [str(pair.mask.relative_to(tmp_path)) for pair in train.pairs()]
    assert masks == ["SegmentationClass/2007_1.png", "SegmentationClass/2007_2.png", "SegmentationClassAug/2008_1.png"]
    assert [pair.name for pair in val.pairs()] == ["2007_3", "2007_4"]


def test_cityscapes_as_it_is_downloaded(tmp_path: Path) -> None:
    """Label ids of cityscapesScripts (labels.py), by the names of its classes."""
    ids = {
        "road": 7,
        "building": 11,
        "pole": 17,
        "traffic light": 19,
        "person": 24,
        "bus": 28,
        "train": 31,
        "bicycle": 33,
    }
    cityscapes(tmp_path, "labelIds", tuple(range(34)))
    dataset = ours(tmp_path, "cityscapes")
    sample = dataset[0]
    numbers = np.array(Image.open(sample["seg_map_path"]))
    for label, name in enumerate(dataset.metainfo["classes"]):
        found = np.unique(numbers[sample["gt_seg_map"] == label])
        assert len(found) == 1
        assert ids.get(name, found[0]) == found[0]
    assert len(np.unique(numbers[sample["gt_seg_map"] == IGNORE])) == 34 - 19
    cityscapes(tmp_path)  # train ids beside them win
    assert ours(tmp_path, "cityscapes")[0]["seg_map_path"].endswith("_labelTrainIds.png")


def test_coco_stuff_as_it_is_downloaded(tmp_path: Path) -> None:
    """The pixel maps' numbers, as MMSegmentation's converter renumbers them."""
    converter = Path(mmseg.__file__).parent / ".mim/tools/dataset_converters/coco_stuff164k.py"
    if not converter.is_file():
        pytest.skip("this MMSegmentation comes without its converters")
    spec = importlib.util.spec_from_file_location("converter", converter)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    coco_stuff(tmp_path, ("train2017", "val2017"), "", [*module.clsID_to_trID])
    sample = ours(tmp_path, "coco_stuff164k")[0]
    numbers = np.array(Image.open(sample["seg_map_path"]))
    expected = np.vectorize(module.clsID_to_trID.__getitem__)(numbers)
    np.testing.assert_array_equal(sample["gt_seg_map"], expected)


def test_what_is_missing_of_a_published_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def problems(name: str, root: Path) -> str:
        assert run_tool(check, [str(root), "--name", name]) == 2
        return "".join(capsys.readouterr())

    (tmp_path / "empty").mkdir()
    for name in PUBLISHED:
        assert "has no " in problems(name, tmp_path / "empty")
    root = tmp_path / "cityscapes"
    cityscapes(root)
    (root / "leftImg8bit/train/bonn/bonn_0_2_leftImg8bit.png").unlink()
    (root / "gtFine/val/bonn/bonn_0_2_gtFine_labelTrainIds.png").unlink()
    found = problems("cityscapes", root)
    assert "bonn_0_2_gtFine_labelTrainIds.png: mask without an image" in found
    assert "bonn_0_2_leftImg8bit.png: image without a mask" in found
    write(root, "leftImg8bit/val/x_leftImg8bit.png", "gtFine/val/x_gtFine_labelTrainIds.png", some([0, 40], 0))
    assert "label of no class: 40" in problems("cityscapes", root)
    root = tmp_path / "voc"
    voc(root)
    listed(root, "ImageSets/Segmentation/train.txt", ["2007_1", "2007_9"])
    assert "name without image and mask: 2007_9 is listed" in problems("voc2012", root)
    (root / "ImageSets/Segmentation/train.txt").unlink()
    assert "train.txt does not exist; expected the list of names" in problems("voc2012", root)
    (root / "ImageSets/Segmentation/train.txt").write_bytes(b"\xff\xfe")
    assert "is no text in UTF-8" in problems("voc2012", root)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no name"):
        splits_of(DatasetSettings(name="voc2012", root=str(root)))[0].pairs()
