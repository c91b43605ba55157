"""Mask files as class numbers, and images of any kind: against MMSegmentation's own transforms and plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image, ImageOps

from mae_transfer.errors import DataError
from mae_transfer.segmentation.colours import read_colours
from mae_transfer.segmentation.dataset import LoadPicture, UnusableSample
from mae_transfer.segmentation.masks import IGNORE, MaskReader, Numbering

COLOURS = {(200, 10, 10): 0, (10, 200, 10): 1, (10, 10, 200): 2, (0, 0, 0): IGNORE}


def stored(path: Path, array: np.ndarray, **more: Any) -> Path:
    Image.fromarray(array).save(path, **more)
    return path


@pytest.fixture
def numbers() -> np.ndarray:
    return np.random.default_rng(0).choice(np.array([0, 1, 2, 3, 255], np.uint8), (9, 13))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("kind", ["auto", "index"])
def test_numbers_are_read_as_mmseg_reads_them(tmp_path: Path, numbers: np.ndarray, reduce: bool, kind: str) -> None:
    path = stored(tmp_path / "mask.png", numbers)
    results = {"seg_map_path": str(path), "reduce_zero_label": reduce, "label_map": None, "seg_fields": []}
    theirs = LoadAnnotations(imdecode_backend="pillow").transform(results)["gt_seg_map"]
    ours = MaskReader(kind=kind, num_classes=4 - reduce, reduce_zero_label=reduce).read(path, (9, 13))
    np.testing.assert_array_equal(ours, theirs)


def test_a_palette_only_shows(tmp_path: Path, numbers: np.ndarray) -> None:
    picture = Image.fromarray(numbers, mode="P")
    picture.putpalette([9] * 768)
    picture.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(MaskReader(num_classes=4).read(tmp_path / "mask.png"), numbers)


def test_one_bit_is_0_and_1_where_numbers_are_asked_for(tmp_path: Path, numbers: np.ndarray) -> None:
    path = stored(tmp_path / "mask.png", numbers > 1)
    np.testing.assert_array_equal(MaskReader(kind="index", num_classes=2).read(path), numbers > 1)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colours_are_looked_up(tmp_path: Path, mode: str) -> None:
    labels = np.random.default_rng(0).choice([0, 1, 2, IGNORE], (9, 13))
    pixels = np.zeros((9, 13, 3), np.uint8)
    for colour, label in COLOURS.items():
        pixels[labels == label] = colour
    picture = Image.fromarray(pixels)
    picture = picture.quantize(8, dither=Image.Dither.NONE) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(
        MaskReader(kind="colours", num_classes=3, colours=COLOURS).read(tmp_path / "mask.png"), labels
    )


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_black_and_white(tmp_path: Path, numbers: np.ndarray, white: int) -> None:
    is_white = numbers > 1
    dtype = np.uint16 if white > 255 else np.uint8
    path = stored(tmp_path / "mask.png", (is_white * white).astype(dtype))
    np.testing.assert_array_equal(MaskReader(kind="binary", num_classes=2).read(path), is_white)
    if white == 255:
        for mode in ("1", "RGB", "P"):
            Image.open(path).convert(mode).save(tmp_path / f"{mode}.png")
            np.testing.assert_array_equal(
                MaskReader(kind="binary", num_classes=2).read(tmp_path / f"{mode}.png"), is_white
            )


@pytest.mark.parametrize("size", [(18, 26), (27, 39), (6, 9), (10, 14)])
def test_resizing_takes_the_nearest_label(tmp_path: Path, numbers: np.ndarray, size: tuple[int, int]) -> None:
    path = stored(tmp_path / "mask.png", numbers)
    rows = np.floor((np.arange(size[0]) + 0.5) * 9 / size[0]).astype(int)
    columns = np.floor((np.arange(size[1]) + 0.5) * 13 / size[1]).astype(int)
    ours = MaskReader(num_classes=4, resize=True).read(path, size)
    np.testing.assert_array_equal(ours, numbers[rows][:, columns])
    with pytest.raises(DataError, match="mask of another size than its image"):
        MaskReader(num_classes=4).read(path, size)


def test_other_numberings_go_by_the_ending(tmp_path: Path) -> None:
    reader = MaskReader(
        num_classes=2,
        numberings=(
            Numbering(ending="_a.png", classes={7: 0, 9: 1, 0: IGNORE}),
            Numbering(ending=".png", classes={1: 1}),
        ),
    )
    first = stored(tmp_path / "mask_a.png", np.array([[7, 9, 0]], np.uint8))
    second = stored(tmp_path / "mask.png", np.array([[1, 1, 1]], np.uint8))
    assert reader.read(first).tolist() == [[0, 1, IGNORE]]
    assert reader.read(second).tolist() == [[1, 1, 1]]
    with pytest.raises(DataError, match=r"label of no class: 3 \(1 pixels\)"):
        reader.read(stored(first, np.array([[7, 3]], np.uint8)))


# Tables of colours

TABLES = {
    "front.txt": "# R G B name\n\n200 10 10 fire engine\n#0ac80a  tree\n10,10,200 sea\n",
    "back.txt": "fire engine: 200 10 10\ntree = #0AC80A\nsea\t10\t10\t200\n",
    "t.csv": "name, r, g, b\nfire engine,200,10,10\ntree,10,200,10\nsea,10,10,200\n",
    "other.csv": "R,G,B,Class\n200,10,10,fire engine\n10,200,10,tree\n10,10,200,sea\n",
    "t.json": json.dumps({"fire engine": [200, 10, 10], "tree": "#0ac80a", "sea": "10 10 200"}),
    "list.json": json.dumps(
        [
            {"label": n + 1, "name": name, "colour": c}
            for n, (name, c) in enumerate(
                {"fire engine": [200, 10, 10], "tree": [10, 200, 10], "sea": [10, 10, 200]}.items()
            )
        ]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_colours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TABLES[name])
    found = read_colours(tmp_path / name)
    assert list(found.items()) == [("fire engine", (200, 10, 10)), ("tree", (10, 200, 10)), ("sea", (10, 10, 200))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "lists no class"),
        ("a.txt", "1 2 3\n", r"line 1 of .*'1 2 3'; expected R G B name"),
        ("a.txt", "1 2 3 4 5 6\n", "expected R G B name"),
        ("a.txt", "1 2 3 a\n4 5 6 a\n", "lists 'a' twice"),
        ("a.txt", b"\xff\xff", "no text in UTF-8"),
        ("a.csv", "class;colour\nx;1\n", "has the columns class;colour; expected name, r, g, b"),
        ("a.csv", "name,r,g,b\nx,1,2\n", "row 1 of .* holds no colour"),
        ("a.json", "[1]", "holds no colours"),
        ("a.json", '{"a": [1, 2]}', "'a' in .* holds no colour; expected three whole numbers"),
        ("a.json", '[{"colour": [1, 2, 3]}]', "entry 0 of .* names no class"),
        ("a.json", "{", "is not JSON"),
        ("a.xml", "", r"ends in \.xml; expected \.txt, \.csv or \.json"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_colours(tmp_path / name)


# Images


def read(path: Path) -> np.ndarray:
    results = LoadPicture().transform({"img_path": str(path)})
    assert results["img_shape"] == results["ori_shape"] == results["img"].shape[:2]
    assert results["img"].dtype == np.uint8
    return results["img"]


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.add.outer(np.arange(40), np.arange(56))[..., None] * np.array([1, 2, 0]) + np.array([0, 0, 90])
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "a.tif"])
def test_plain_images_are_read_as_mmcv_reads_them(tmp_path: Path, picture: Image.Image, name: str) -> None:
    picture.save(tmp_path / name)
    theirs = LoadImageFromFile().transform({"img_path": str(tmp_path / name)})["img"]
    difference = np.abs(read(tmp_path / name).astype(int) - theirs)
    assert difference.max() <= (2 if name in ("a.jpg", "a.webp") else 0)


def test_odd_images_are_read_upright_in_8_bits(tmp_path: Path, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        read(tmp_path / "turned.png")[..., ::-1], np.array(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")))
    )
    assert read(tmp_path / "turned.png").shape == (56, 40, 3)
    gray = np.array(picture.convert("L"))
    Image.fromarray(gray.astype(np.uint16) << 8 | 77).save(tmp_path / "16.png")
    Image.fromarray(gray).save(tmp_path / "gray.png")
    for name in ("16.png", "gray.png"):
        np.testing.assert_array_equal(read(tmp_path / name), np.stack([gray] * 3, -1))
    transparent = picture.copy()
    transparent.putalpha(Image.fromarray(gray))
    transparent.save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read(tmp_path / "rgba.png")[..., ::-1], np.array(picture))
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(read(tmp_path / "cmyk.tif")[..., ::-1], np.array(picture))


def test_an_error_from_a_worker_is_its_message() -> None:
    raised = UnusableSample("mask x.png: label of no class")
    assert str(raised) == "mask x.png: label of no class"
    text = (
        f"Caught {type(raised).__name__} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    )
    text += f"  File …\n{type(raised).__module__}.{type(raised).__name__}: {raised}\n"
    assert str(UnusableSample(text)) == str(raised)
