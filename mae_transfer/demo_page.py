"""The page that ``make demo`` ends with: what was run, what came out, side by side for both starts."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from mae_transfer.charts import Bar, Series
from mae_transfer.cutouts import OBJECTS
from mae_transfer.demo_plan import STARTS, DemoSize, Layout, Record, Stage, shown
from mae_transfer.engine.files import atomic_path
from mae_transfer.report import Page
from mae_transfer.scenes import CLASSES
from mae_transfer.visualize import GridRow, image_grid, to_picture
from pretrain.load import load_mae
from pretrain.reconstruct import reconstruct_masked

NUM_PICTURES = 4  # rows of predictions
_TILE = 256  # pixels of the overview's pictures
OVERVIEW_COLUMNS = ("unseen scene", "what the encoder sees", "completed by the MAE", "Mask R-CNN", "UperNet")
_PANEL_GAP = 6  # pixels between the panels of the tools' own pictures
_TITLE_BAR = 22  # pixels above the panels of a segmentation picture


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(lines: Sequence[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of the lines that have both; where a resumed run wrote a step twice, the later one."""
    return sorted({float(line[x]): float(line[y]) for line in lines if x in line and y in line}.items())


def averaged(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """The means of ``count`` points after one another, and of what is left."""
    parts = [points[start : start + count] for start in range(0, len(points), count)]
    return [(part[-1][0], fmean(y for _, y in part)) for part in parts]


def detection_scores(layout: Layout, start: str) -> dict[str, float]:
    """Box and mask AP in per cent, by the names they have on the page."""
    scores = json.loads((layout.detection(start) / "evaluation.json").read_text(encoding="utf-8"))
    names = {"bbox": "box", "segm": "mask"}
    found = {f"{names[kind]} {key}": scores[kind][key] for kind in names for key in ("AP", "AP50", "AP75")}
    return found | {f"box AP, {name}": scores["bbox"][f"AP-{name}"] for name in OBJECTS}


def segmentation_lines(layout: Layout, start: str) -> list[dict[str, Any]]:
    """What mmengine wrote of a run, its resumed parts in order."""
    files = sorted(layout.segmentation(start).glob("*/vis_data/scalars.json"))
    return [line for path in files for line in read_lines(path)]


def segmentation_scores(layout: Layout, start: str) -> dict[str, float]:
    """mIoU and accuracies in per cent, of the last validation."""
    last = [line for line in segmentation_lines(layout, start) if "mIoU" in line][-1]
    return {"mIoU": last["mIoU"], "mean class accuracy": last["mAcc"], "pixel accuracy": last["aAcc"]}


def classification_scores(layout: Layout, start: str) -> dict[str, float]:
    """Top-1 in per cent after the last step."""
    lines = read_lines(layout.classification(start) / "metrics.jsonl")
    return {"top-1": curve(lines, "step", "val_top1")[-1][1]}


def difference(metric: str, pretrained: float, random: float) -> str:
    """The two measurements and their difference, said plainly, whichever way it falls."""
    gap = round(pretrained, 1) - round(random, 1)
    said = f"{metric}: {pretrained:.1f} from the pretrained encoder, {random:.1f} from random weights"
    if abs(gap) < 0.05:
        return f"{said}. No difference."
    return f"{said}. The pretrained start is {abs(gap):.1f} points {'higher' if gap > 0 else 'lower'}."


def detection_panel(path: Path, index: int) -> Image.Image:
    """Of a detection run's picture: 0 the ground truth, 1 the predictions."""
    return _panel(path, index, count=2, top=0)


def segmentation_panel(path: Path, index: int) -> Image.Image:
    """Of a segmentation run's picture: 0 the image, 1 the ground truth, 2 the prediction."""
    return _panel(path, index, count=3, top=_TITLE_BAR)


def _panel(path: Path, index: int, *, count: int, top: int) -> Image.Image:
    """One of the square panels that stand side by side, enlarged by the tool that drew them."""
    with Image.open(path) as picture:
        side = (picture.width - (count - 1) * _PANEL_GAP) // count
        left = index * (side + _PANEL_GAP)
        return picture.convert("RGB").crop((left, top, left + side, top + side))


def _shared_pictures(folders: Sequence[Path]) -> list[str]:
    """Names of pictures that every folder has, at most NUM_PICTURES of them."""
    names = set.intersection(*({path.name for path in (folder / "predictions").glob("*.png")} for folder in folders))
    return sorted(names)[:NUM_PICTURES]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _gap(pretrained: float, random: float) -> str:
    """Difference of two numbers as they are printed."""
    gap = round(pretrained, 1) - round(random, 1)
    if math.isnan(gap):
        return "–"
    return f"{gap:+.1f}" if abs(gap) >= 0.05 else "0.0"


def _score_table(page: Page, scores: dict[str, dict[str, float]], caption: str) -> None:
    pretrained, random = (scores[start] for start in STARTS)
    rows = [
        [name, _number(pretrained[name]), _number(random[name]), _gap(pretrained[name], random[name])]
        for name in pretrained
    ]
    page.table(["per cent", *STARTS.values(), "difference"], rows, caption=caption)


def overview(layout: Layout, *, rows: int = 2) -> list[list[Image.Image]]:
    """The demo in a few pictures: scenes of the validation set as in OVERVIEW_COLUMNS, all of the scenes' size.

    Args:
        layout: where a finished demo's files are.
        rows: scenes, at most.
    """
    detection, segmentation = layout.detection("pretrained"), layout.segmentation("pretrained")
    loaded = load_mae(layout.pretraining / "model.safetensors")
    found = []
    for index, name in enumerate(_shared_pictures([detection, segmentation])[:rows]):
        with Image.open((layout.scenes / "coco" / "val" / name).with_suffix(".jpg")) as image:
            scene = image.convert("RGB")
        _, masked, _, completed = reconstruct_masked(loaded, scene, kind="random", ratio=0.75, seed=0, index=index)
        small = (Image.fromarray(to_picture(part[0])) for part in (masked, completed))
        found.append(
            [
                scene,
                *(picture.resize(scene.size, Image.Resampling.NEAREST) for picture in small),
                detection_panel(detection / "predictions" / name, 1).resize((_TILE, _TILE)),
                segmentation_panel(segmentation / "predictions" / name, 2).resize((_TILE, _TILE)),
            ]
        )
    return found


def save_overview(panels: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """The overview as one PNG."""
    grid = [GridRow(pictures=[np.asarray(picture) for picture in row]) for row in panels]
    with atomic_path(path) as temporary:
        image_grid(grid, columns=OVERVIEW_COLUMNS, tile_height=_TILE).save(temporary, format="PNG", optimize=True)


def build_page(layout: Layout, size: DemoSize, stages: Sequence[Stage], records: Sequence[Record]) -> Page:
    """The page of a finished demo; its overview is written beside it, too.

    Args:
        layout: where its files are.
        size: what it was run with.
        stages: its commands, in order.
        records: what is remembered of each.
    """
    page = Page(
        title="From masked pretraining to detection, segmentation and classification",
        lead="A small Vision Transformer learns from unlabelled images by filling in what is hidden. Its encoder then "
        "starts Mask R-CNN in Detectron2, UperNet in MMSegmentation and a classifier, each beside the same run from "
        "random weights.",
    )
    panels = overview(layout)
    save_overview(panels, layout.out / "overview.png")
    detection = {start: detection_scores(layout, start) for start in STARTS}
    segmentation = {start: segmentation_scores(layout, start) for start in STARTS}
    classification = {start: classification_scores(layout, start) for start in STARTS}
    measured = [("box AP", detection), ("mask AP", detection), ("mIoU", segmentation), ("top-1", classification)]
    seconds = sum(record.seconds for record in records)
    facts = []
    for metric, scores in measured:
        facts.append((" / ".join(_number(scores[start][metric]) for start in STARTS), f"{metric}: pretrained / random"))
    page.facts([*facts, (_clock(seconds), f"in all, on {os.cpu_count()} cores")])
    _results(page, panels, measured)
    _scenes(page, layout, size)
    _pretraining(page, layout, size)
    _detection(page, layout, size, detection)
    _segmentation(page, layout, size, segmentation)
    _classification(page, layout, size, classification)
    _commands(page, stages, records)
    return page


def _results(
    page: Page,
    panels: Sequence[Sequence[Image.Image]],
    measured: Sequence[tuple[str, dict[str, dict[str, float]]]],
) -> None:
    page.section("Results")
    caption = (
        "Scenes of the validation set. Hidden patches are completed as predicted, visible ones are the scene's own; "
        "detection and segmentation started from the pretrained encoder."
    )
    page.picture_grid(OVERVIEW_COLUMNS, panels, caption=caption)
    bars = []
    for metric, scores in measured:
        bars += [Bar(group=metric, name=STARTS[start], value=scores[start][metric]) for start in STARTS]
        page.text(difference(metric, scores["pretrained"][metric], scores["random"][metric]))
    page.bars(bars, unit="%", caption="Validation scenes; both starts had the same data, budget and settings.")
    page.text(
        "One seed, a few minutes of training, scenes made of the same cut-outs for training and validation: this shows "
        "that the chain works from end to end. It is no evidence for or against pretraining.",
        note=True,
    )


def _segmentation_drawing() -> tuple[list[tuple[int, int, int]], Callable[..., np.ndarray]]:
    """The classes' colours and the overlay of the segmentation tools."""
    from mae_transfer.segmentation.colours import palette  # the framework, when it is needed
    from mae_transfer.segmentation.visualize import overlay

    return palette(len(CLASSES)), overlay


def _scenes(page: Page, layout: Layout, size: DemoSize) -> None:
    page.section("Data")
    page.text(
        f"{size.unlabelled} unlabelled scenes for pretraining, {size.train} labelled ones to train on, {size.val} to "
        f"validate on; {size.side} × {size.side} pixels, composed of photographs that lie inside the scikit-image and "
        "scikit-learn packages. Labels are exact, because the scenes are composed."
    )
    names = [f"train_{index:05d}" for index in range(4)]
    folder = layout.scenes / "ade"
    photos, labelled = [], []
    colours, overlay = _segmentation_drawing()
    for name in names:
        with Image.open(folder / "images" / "training" / f"{name}.jpg") as image:
            photos.append(image.convert("RGB"))
        with Image.open(folder / "annotations" / "training" / f"{name}.png") as labels:
            classes = np.asarray(labels).astype(np.int64) - 1  # 0 = unlabelled becomes 255
        classes = np.where(classes < 0, 255, classes)
        labelled.append(Image.fromarray(overlay(np.asarray(photos[-1]), classes, colours)))
    page.picture_grid([""] * 4, [photos, labelled], caption="Training scenes, and below them their semantic labels.")
    page.legend([(name, f"rgb{colour}") for name, colour in zip(CLASSES, colours)])


def _pretraining(page: Page, layout: Layout, size: DemoSize) -> None:
    page.section("Pretraining")
    lines = read_lines(layout.pretraining / "metrics.jsonl")
    page.text(
        "Three of four patches are hidden; the encoder sees the others, and a small decoder predicts the pixels of the "
        "hidden ones. Pixels normalised patch by patch, which the paper found to transfer better and which are the "
        "default of pretraining, take longer to give pictures; this run is short and takes the plain ones."
    )
    loss = curve(lines, "step", "loss")
    unseen = curve(lines, "step", "val_loss")
    series = [Series(name="training", points=loss)]
    if unseen:
        series.append(Series(name="unseen scenes", points=unseen))
    said = f"After {size.pretrain_steps} steps: {loss[-1][1]:.3f} on the last batch"
    said += f", {unseen[-1][1]:.3f} on unseen scenes." if unseen else "."
    page.chart(series, x_label="step", y_label="mean squared error on hidden patches", caption=said)
    page.heading("Unseen scenes, three quarters hidden")
    with Image.open(layout.reconstructions) as picture:
        page.picture(
            picture.convert("RGB"), caption="Original, what the encoder sees, the prediction, and both together."
        )


def _detection(page: Page, layout: Layout, size: DemoSize, scores: dict[str, dict[str, float]]) -> None:
    page.section("Detection")
    page.text(f"Mask R-CNN, {size.detection_iters} iterations from each start.")
    page.chart(
        [
            Series(
                name=STARTS[start],
                points=averaged(
                    curve(read_lines(layout.detection(start) / "metrics.json"), "iteration", "total_loss"), 10
                ),
            )
            for start in STARTS
        ],
        x_label="iteration",
        y_label="training loss",
        caption="Sum of the region proposal, box and mask losses, averaged over 10 iterations.",
    )
    _score_table(page, scores, f"COCO average precision on {size.val} validation scenes.")
    folders = [layout.detection(start) for start in STARTS]
    rows = [
        [
            detection_panel(folders[0] / "predictions" / name, 0),
            *(detection_panel(folder / "predictions" / name, 1) for folder in folders),
        ]
        for name in _shared_pictures(folders)
    ]
    page.heading("Predictions on validation scenes")
    columns = ["ground truth", *STARTS.values()]
    page.picture_grid(columns, rows, caption="Detections with a score of at least one half.")


def _segmentation(page: Page, layout: Layout, size: DemoSize, scores: dict[str, dict[str, float]]) -> None:
    page.section("Segmentation")
    page.text(f"UperNet, {size.segmentation_iters} iterations from each start.")
    page.chart(
        [
            Series(name=STARTS[start], points=curve(segmentation_lines(layout, start), "iter", "loss"))
            for start in STARTS
        ],
        x_label="iteration",
        y_label="training loss",
        caption="Cross entropy of the head and, at four tenths, of the auxiliary head.",
    )
    _score_table(page, scores, f"{len(CLASSES)} classes, {size.val} validation scenes.")
    folders = [layout.segmentation(start) for start in STARTS]
    rows = [
        [
            segmentation_panel(folders[0] / "predictions" / name, 0),
            segmentation_panel(folders[0] / "predictions" / name, 1),
            *(segmentation_panel(folder / "predictions" / name, 2) for folder in folders),
        ]
        for name in _shared_pictures(folders)
    ]
    page.heading("Predictions on validation scenes")
    page.picture_grid(["image", "ground truth", *STARTS.values()], rows, caption="Every pixel's most likely class.")
    page.legend([(name, f"rgb{colour}") for name, colour in zip(CLASSES, _segmentation_drawing()[0])])


def _classification(page: Page, layout: Layout, size: DemoSize, scores: dict[str, dict[str, float]]) -> None:
    page.section("Classification")
    page.text(
        "Pictures of single objects, cut out of the scenes; a linear layer on the mean of the patch tokens, and the "
        f"whole encoder with it, trained for {size.classification_steps} steps from each start."
    )
    page.chart(
        [
            Series(
                name=STARTS[start],
                points=averaged(curve(read_lines(layout.classification(start) / "metrics.jsonl"), "step", "loss"), 5),
            )
            for start in STARTS
        ],
        x_label="step",
        y_label="training loss",
        caption="Cross entropy, averaged over 5 steps.",
    )
    _score_table(page, scores, "Objects of the validation scenes.")
    page.heading("Objects of validation scenes, by what they are and what they are taken for")
    pictures = []
    for start in STARTS:
        with Image.open(layout.classification(start) / "confusion.png") as picture:
            pictures.append(picture.convert("RGB"))
    page.picture_grid([*STARTS.values()], [pictures], caption="Confusion matrices; right answers on the diagonal.")


def _commands(page: Page, stages: Sequence[Stage], records: Sequence[Record]) -> None:
    page.section("What was run")
    page.text("The commands, as they can be typed in the checkout. The same ones serve for images of one's own.")
    for stage in stages:
        page.commands([shown(stage.command)])
    page.heading("Times")
    total = sum(record.seconds for record in records)
    rows = [[stage.title, _clock(record.seconds)] for stage, record in zip(stages, records)]
    page.table(["stage", "time"], [*rows, ["in all", _clock(total)]])
    page.text(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {'CUDA' if torch.cuda.is_available() else 'no GPU'}. "
        "Start-up and evaluation are included."
    )
