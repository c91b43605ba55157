"""Demo data: scenes composed of photographs that lie inside the scikit-image and scikit-learn wheels.

Nothing is downloaded. Six kinds of objects are cut out of photographs along outlines stored beside this file
(``assets/outlines.json``), changed in size, angle, colour and light, and put in front of six kinds of photographed
ground and background, nearer ones before farther ones. Scene ``i`` of a split is a function of (seed, split, i) alone.

The same scenes are written four ways: unlabelled images for pretraining, COCO instances for detection, the ADE20K
layout for segmentation, and their objects cut out, a folder a class, for classification. Training and validation scenes
differ, the photographs they are cut from do not: the demo shows that the chain works, not how well a model generalises.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from tqdm import tqdm

from mae_transfer.cutouts import LONGEST_SIDE, OBJECTS, SURFACES, between, paint_surface, pose
from mae_transfer.errors import DataError

CLASSES = OBJECTS + SURFACES  # label k + 1 in the index images; 0 = unlabelled
SPLITS = ("unlabelled", "train", "val")
LEAST_SCENES = 4  # the first four scenes of a split are laid out to show every class

OVERSAMPLING = 2  # scenes are painted at twice their size: smooth edges, and masks counted from four votes a pixel
SURROUNDINGS = 1.2  # side of an object's own picture over the longer side of its box
VISIBLE_FRACTION = 0.3  # of every object, at least

GROUNDS = ("grass", "gravel", "brick", "wood")
BACKDROPS = ("sky", "foliage", "brick", "wood")

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One object of a scene: its category's place in OBJECTS and its visible pixels (H, W)."""

    category: int
    mask: Mask


@dataclass(frozen=True, kw_only=True)
class Scene:
    """image: RGB. labels: (H, W) uint8, 0 = unlabelled, k + 1 = CLASSES[k]. instances: farthest first."""

    image: Image.Image
    labels: NDArray[np.uint8]
    instances: list[Instance]


def _paste(canvas: Image.Image, cut: Image.Image, corner: tuple[int, int]) -> None:
    """Put a cut-out and its soft shadow on the canvas."""
    reach = max(2, cut.height // 16)
    margin = 3 * reach  # beyond it the blurred shadow is nothing
    shadow = Image.new("L", (cut.width + 2 * margin, cut.height + 2 * margin), 0)
    shadow.paste(cut.getchannel("A"), (margin, margin))
    shadow = shadow.filter(ImageFilter.GaussianBlur(reach)).point(lambda value: value * 0.45)
    canvas.paste((12, 10, 14), (corner[0] - margin + reach, corner[1] - margin + reach // 2), shadow)
    canvas.paste(cut.convert("RGB"), corner, cut.getchannel("A"))


def _backdrop(
    width: int, height: int, rng: np.random.Generator, index: int
) -> tuple[Image.Image, Mask, int, tuple[int, int]]:
    """Ground below, something behind it above a slightly tilted horizon.

    Returns:
        canvas, which of its pixels lie above the horizon (height, width), the horizon's mean row, and the places in
        CLASSES of what is above and of what is below.
    """
    ground = GROUNDS[index % 4 if index < LEAST_SCENES else rng.integers(4)]
    behind = BACKDROPS[index % 2 if index < LEAST_SCENES else rng.choice(4, p=[0.4, 0.3, 0.15, 0.15])]
    seen_from_above = behind == ground or (index >= LEAST_SCENES and rng.random() < 0.2)  # ground everywhere
    horizon = 0 if seen_from_above else round(height * between(rng, 0.22, 0.5))
    canvas = paint_surface(ground, (width, height), rng, receding=not seen_from_above)
    above = np.zeros((height, width), dtype=bool)
    if not seen_from_above:
        tilt = between(rng, -0.05, 0.05)
        above = np.arange(height)[:, None] < horizon + tilt * (np.arange(width)[None] - width / 2)
        edge = Image.fromarray((above * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(OVERSAMPLING))
        canvas.paste(paint_surface(behind, (width, height), rng, receding=False), mask=edge)
    return canvas, above, horizon, (CLASSES.index(behind), CLASSES.index(ground))


def _light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A camera's share: uneven light, exposure, grain, now and then a little blur."""
    pixels = np.asarray(image, dtype=np.float64)
    height, width = pixels.shape[:2]
    rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    slope = rows * between(rng, -0.15, 0.15) + columns * between(rng, -0.15, 0.15)
    vignette = 1 - between(rng, 0.0, 0.18) * (rows**2 + columns**2) / 2
    pixels = pixels * ((1 + slope) * vignette * between(rng, 0.88, 1.12))[..., None] * rng.uniform(0.96, 1.04, size=3)
    pixels = pixels + rng.normal(0, between(rng, 1.0, 4.0), size=pixels.shape)
    lit = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return lit.filter(ImageFilter.GaussianBlur(between(rng, 0.3, 0.8))) if rng.random() < 0.25 else lit


def _votes(fine: Mask) -> NDArray[np.int64]:
    """How many of a pixel's fine pixels are set: (H·k, W·k) -> (H, W), k = OVERSAMPLING."""
    k = OVERSAMPLING
    return fine.reshape(fine.shape[0] // k, k, fine.shape[1] // k, k).sum(axis=(1, 3))


def compose(*, size: tuple[int, int], seed: int, split: str, index: int) -> Scene:
    """Scene `index` of a split.

    Args:
        size: height and width in pixels.
        seed: of the whole data set.
        split: one of SPLITS.
        index: from 0; the first LEAST_SCENES of a split together show every class.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    height, width = size[0] * OVERSAMPLING, size[1] * OVERSAMPLING
    canvas, above, horizon, (behind, ground) = _backdrop(width, height, rng, index)
    number = int(rng.integers(3, 8))
    categories = list(rng.integers(len(OBJECTS), size=number))
    if index < LEAST_SCENES:
        categories[:3] = [(3 * index + offset) % len(OBJECTS) for offset in range(3)]
    # Where objects stand, far to near: the lower in the picture, the nearer and larger.
    depths = np.sort(rng.uniform(0, 1, size=number))
    owner = np.zeros((height, width), dtype=np.int64)  # 0 nobody, n + 1 the n-th object kept
    whole: list[int] = []  # fine pixels of the objects kept, were they not hidden
    seen: list[int] = []  # of these, visible so far
    kept: list[int] = []
    for category, depth in zip(rng.permutation(categories), depths):
        name = OBJECTS[category]
        longest = LONGEST_SIDE[name] * min(width, height) * (0.55 + 0.45 * depth) * between(rng, 0.85, 1.2)
        for _ in range(20):  # until it hides too much of nobody
            cut = pose(name, rng, longest)
            foot = horizon + (0.15 + 0.85 * depth) * (height - horizon)
            left_edge = round(between(rng, -0.15, 1.15) * width - cut.width / 2)
            top = round(min(foot, height * 1.05) - cut.height)
            solid = Image.new("L", (width, height), 0)
            solid.paste(cut.getchannel("A"), (left_edge, top))
            covers = np.asarray(solid) >= 128
            area = int((np.asarray(cut.getchannel("A")) >= 128).sum())
            hidden = np.bincount(owner[covers], minlength=len(kept) + 1)[1:]
            rest = [count - loss for count, loss in zip(seen, hidden)]
            if covers.sum() >= VISIBLE_FRACTION * area and all(
                left >= VISIBLE_FRACTION * of for left, of in zip(rest, whole)
            ):
                _paste(canvas, cut, (left_edge, top))
                kept.append(int(category))
                owner[covers] = len(kept)
                whole.append(area)
                seen = [*rest, int(covers.sum())]
                break
    image = _light(canvas.resize((size[1], size[0]), Image.Resampling.LANCZOS), rng)

    half = OVERSAMPLING**2 // 2
    labels = np.where(_votes(above) > half, behind + 1, ground + 1).astype(np.uint8)
    votes = [_votes(owner == order + 1) for order in range(len(kept))]
    instances = []
    claimed = np.zeros(size, dtype=bool)
    for order in reversed(range(len(kept))):  # nearest first: of equal votes the nearer has the pixel
        mask = (votes[order] >= half) & ~claimed
        claimed |= mask
        labels[mask] = kept[order] + 1
        if mask.any():
            instances.append(Instance(category=kept[order], mask=mask))
    # A pixel that an object shares with something else belongs to neither.
    pure = np.any([vote == 2 * half for vote in votes], axis=0)
    labels[(_votes(owner > 0) > 0) & ~pure] = 0
    return Scene(image=image, labels=labels, instances=instances[::-1])


@dataclass(frozen=True, kw_only=True)
class _Job:
    size: tuple[int, int]
    seed: int
    split: str
    index: int


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What a scene's files hold. annotations lack their ids, which depend on the scenes before; objects are (place in
    OBJECTS, picture), one of each annotation."""

    jpeg: bytes
    png: bytes
    annotations: list[dict[str, Any]]
    objects: list[tuple[int, bytes]]


def _render(job: _Job) -> _Files:
    """Compose a scene and encode its files; runs in worker processes."""
    from pycocotools import mask as rle

    scene = compose(size=job.size, seed=job.seed, split=job.split, index=job.index)
    png = io.BytesIO()
    Image.fromarray(scene.labels).save(png, format="PNG")
    annotations: list[dict[str, Any]] = []
    objects = []
    for instance in scene.instances:
        code = rle.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
        annotations.append(
            {
                "category_id": instance.category + 1,
                "segmentation": {"size": list(job.size), "counts": code["counts"].decode("ascii")},
                "bbox": [float(value) for value in rle.toBbox(code)],  # x, y, width, height of the visible pixels
                "area": float(rle.area(code)),
                "iscrowd": 0,
            }
        )
        objects.append((instance.category, _jpeg(_portrait(scene.image, annotations[-1]["bbox"]))))
    return _Files(jpeg=_jpeg(scene.image), png=png.getvalue(), annotations=annotations, objects=objects)


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=92, subsampling=0)
    return content.getvalue()


def _portrait(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """A square around a box (x, y, width, height) with a little of what surrounds it, moved to lie within the image."""
    x, y, width, height = box
    side = round(min(SURROUNDINGS * max(width, height), *image.size))
    left, top = (
        min(max(round(start + length / 2 - side / 2), 0), whole - side)
        for start, length, whole in ((x, width, image.width), (y, height, image.height))
    )
    return image.crop((left, top, left + side, top + side))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_split(part: Path, split: str, scenes: Iterable[_Files], size: tuple[int, int]) -> None:
    """The files of one split: JPEG only when it is unlabelled, else COCO, ADE20K and a folder a class."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        name = f"{split}_{index:05d}"
        if split == "unlabelled":
            _write(part / split / f"{name}.jpg", scene.jpeg)
            continue
        folder = {"train": "training", "val": "validation"}[split]
        _write(part / "coco" / split / f"{name}.jpg", scene.jpeg)
        _write(part / "ade" / "images" / folder / f"{name}.jpg", scene.jpeg)
        _write(part / "ade" / "annotations" / folder / f"{name}.png", scene.png)
        images.append({"id": index + 1, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]})
        for annotation in scene.annotations:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
        for number, (category, jpeg) in enumerate(scene.objects):
            _write(part / "classes" / split / OBJECTS[category] / f"{name}_{number}.jpg", jpeg)
    if split != "unlabelled":
        categories = [{"id": number + 1, "name": name} for number, name in enumerate(OBJECTS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write(part / "coco" / "annotations" / f"instances_{split}.json", json.dumps(content).encode())


def write_scenes(
    out: Path,
    *,
    size: tuple[int, int] = (192, 192),
    num_unlabelled: int = 1000,
    num_train: int = 160,
    num_val: int = 48,
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[Iterable[_Files], int], Iterable[_Files]] = lambda scenes, total: scenes,
) -> Path:
    """Write a data set; `out` appears only when it is complete.

        out/unlabelled/*.jpg
        out/coco/{train,val}/*.jpg
        out/coco/annotations/instances_{train,val}.json
        out/ade/images/{training,validation}/*.jpg
        out/ade/annotations/{training,validation}/*.png
        out/ade/classes.txt
        out/classes/{train,val}/CLASS/*.jpg

    Args:
        out: a folder that does not exist or is empty.
        size: height and width in pixels.
        num_unlabelled: images for pretraining.
        num_train: labelled scenes to train on, written as COCO, as ADE20K, and as pictures of their objects.
        num_val: labelled scenes to validate on.
        seed: another seed gives other scenes; the same one, the same bytes.
        workers: processes that compose scenes; 0 for this one. The scenes do not depend on it.
        progress: wraps the scenes as they come, of which there are so many in all (tqdm does).

    Returns:
        out.

    Raises:
        DataError: too few scenes or too small ones, or `out` holds something.
    """
    counts = {"unlabelled": num_unlabelled, "train": num_train, "val": num_val}
    for split, count in counts.items():
        if count < LEAST_SCENES:
            raise DataError(f"{count} {split} scenes asked for; at least {LEAST_SCENES} are needed to show every class")
    if min(size) < 64:
        raise DataError(f"scenes of {size[0]}x{size[1]} pixels asked for; objects need at least 64 on each side")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; name another folder or remove it first")
    part = out.with_name(out.name + ".part")
    if part.exists():
        shutil.rmtree(part)  # left over from an interrupted run
    jobs = [_Job(size=size, seed=seed, split=split, index=i) for split, count in counts.items() for i in range(count)]
    with contextlib.ExitStack() as stack:
        rendered: Iterable[_Files]
        if workers > 0:
            rendered = stack.enter_context(ProcessPoolExecutor(workers)).map(_render, jobs, chunksize=8)
        else:
            rendered = map(_render, jobs)
        scenes = iter(progress(rendered, len(jobs)))
        for split, count in counts.items():
            _write_split(part, split, itertools.islice(scenes, count), size)
        assert not list(scenes), "every scene belongs to a split"
    _write(part / "ade" / "classes.txt", "".join(f"{name}\n" for name in CLASSES).encode())
    if out.exists():
        out.rmdir()  # empty, as checked above
    part.rename(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """`tools/make_scenes.py`."""
    parser = argparse.ArgumentParser(
        description="Compose demo scenes from the photographs inside the scikit-image and scikit-learn wheels: "
        "unlabelled images, COCO instances, the ADE20K layout and a folder a class, the same bytes for the same seed."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[192], metavar="PIXELS", help="side, or height and width"
    )
    parser.add_argument("--unlabelled", type=int, default=1000, help="images for pretraining (default: %(default)s)")
    parser.add_argument("--train", type=int, default=160, help="labelled training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=48, help="labelled validation scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if len(arguments.size) > 2 or arguments.seed < 0:
        parser.error("--size takes one or two numbers, and --seed one that is not negative")
    out = write_scenes(
        arguments.out,
        size=(arguments.size[0], arguments.size[-1]),
        num_unlabelled=arguments.unlabelled,
        num_train=arguments.train,
        num_val=arguments.val,
        seed=arguments.seed,
        workers=arguments.workers,
        progress=lambda scenes, total: tqdm(scenes, total=total, desc="scenes", unit="scene"),
    )
    print(f"{arguments.unlabelled} unlabelled, {arguments.train} training and {arguments.val} validation scenes: {out}")
    print(f"  pretraining   {out / 'unlabelled'}")
    print(f"  detection     {out / 'coco' / 'annotations' / 'instances_train.json'} with {out / 'coco' / 'train'}")
    print(
        f"  segmentation  {out / 'ade'} with {out / 'ade' / 'classes.txt'} (labels 1 to {len(CLASSES)}, 0 = unlabelled)"
    )
    print(
        f"  classes       {out / 'classes' / 'train'} and {out / 'classes' / 'val'}: a folder for each kind of object"
    )
    return 0
