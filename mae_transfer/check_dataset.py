"""Check labelled data before a run: what ``tools/check_dataset.py`` runs.

Detection data are a COCO or LVIS json and the folder of its images; segmentation data are a folder of images and masks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mae_transfer.data.problems import Action, Problem
from mae_transfer.engine.files import write_text
from mae_transfer.errors import EXIT_BAD_INPUT, DataError

_OF_FOLDERS = ("name", "classes", "reduce_zero_label", "masks", "colours", "mask_size")  # dataset.*
_EPILOG = """\
Exit status: 0 where the data can be used, with the repairs listed; 2 where something has to be corrected first.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of check_dataset."""
    parser = argparse.ArgumentParser(
        prog="check_dataset.py",
        description="Report every problem of a data set, with the image and annotation it is of and what is done: "
        "refused (correct it first), left out, or repaired.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "data",
        metavar="JSON|NAME|FOLDER",
        help="annotations in COCO or LVIS format, a name such as coco_2017_val (below DETECTRON2_DATASETS), or a "
        "folder of images and masks",
    )
    parser.add_argument("images", nargs="?", metavar="IMAGES", help="the folder that the json's file names start from")
    parser.add_argument(
        "--train-json", metavar="JSON", help="the training annotations: those checked must number categories alike"
    )
    parser.add_argument(
        "--fast", action="store_true", help="look at the headers of images only, rather than decode them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too, one entry a problem")
    folder = parser.add_argument_group("folders of images and masks", "what training is given as dataset.*")
    folder.add_argument("--name", help="a published data set, such as cityscapes: its layout, classes and labels")
    folder.add_argument("--split", action="append", metavar="NAME", help="such as training; by default both")
    folder.add_argument("--classes", metavar="FILE", help="names: .txt, one a line, or .json")
    folder.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        help="label 0 is unlabelled, or a class (--no-…)",
    )
    folder.add_argument("--masks", help="how labels are stored: index, colours, binary")
    folder.add_argument("--colours", metavar="FILE", help="the classes' colours: .txt (R G B name), .csv or .json")
    folder.add_argument("--mask-size", help="masks of another size than their image: refuse, resize")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, recognise the data, and report; returns the exit status."""
    args = build_parser().parse_args(argv)
    settings = {key: getattr(args, key) for key in _OF_FOLDERS if getattr(args, key) is not None}
    if Path(args.data).is_dir() or settings or args.split:
        if args.images or args.train_json:
            raise DataError(f"{args.data} is a folder of images and masks; a COCO json is named before its images")
        problems, content = check_folder(args.data, settings, splits=args.split, decode=not args.fast)
    else:
        problems, content = check_coco(args.data, args.images, train_json=args.train_json, decode=not args.fast)
    counts = []
    for action in dict.fromkeys(problem.action for problem in problems):
        of_action = [problem for problem in problems if problem.action is action]
        counts.append(f"{len(of_action)} {action}")
        for problem in of_action:
            print(f"{action}: {problem}")
    print(f"{args.data}: {content}: {', '.join(counts) or 'no problem'}")
    if args.json:
        write_text(args.json, json.dumps([asdict(problem) for problem in problems], indent=1) + "\n")
    return EXIT_BAD_INPUT if any(problem.action == "refused" for problem in problems) else 0


def check_folder(
    root: str, settings: Mapping[str, Any], *, splits: Sequence[str] | None, decode: bool
) -> tuple[list[Problem], str]:
    """Every problem of a segmentation data set, the refused first, and a line on what it holds; prints its classes.

    Raises:
        UserError: settings that contradict one another, or the classes cannot be had.
    """
    from mae_transfer.segmentation.check import check_split
    from mae_transfer.segmentation.settings import read_settings
    from mae_transfer.segmentation.source import class_names, splits_of

    dataset = read_settings({"dataset": {"root": root, **settings}}).dataset
    parts = list(splits_of(dataset))
    if splits:
        parts = [replace(parts[0], split=name) for name in splits]
    problems: list[Problem] = []
    for part in list(parts):
        try:
            part.scan()
        except DataError as error:
            parts.remove(part)
            problems.append(Problem(action=Action.REFUSED, what=f"split {part.split}", detail=str(error)))
    reports = []
    if parts:
        classes = class_names(parts, dataset.classes)
        for part in parts:
            report = check_split(part, classes, decode=decode)
            print(report.line(), report.table(), sep="\n")
            problems += report.problems
            reports.append(f"{len(report.pairs)} images of {part.split}")
    return _refused_first(problems), ", ".join(reports) or "not usable as it is"


def check_coco(data: str, images: str | None, *, train_json: str | None, decode: bool) -> tuple[list[Problem], str]:
    """Every problem of a detection data set, the refused first, and a line on what it holds.

    Raises:
        UserError: the json or the folder cannot be read at all, or the name is not known.
    """
    from mae_transfer.detection.dataset import read_categories, read_coco
    from mae_transfer.detection.names import find_dataset

    if images is None and not data.endswith(".json") and not Path(data).exists():
        json_file, folder = find_dataset(data)
    elif images is None:
        raise DataError(f"name the folder of the images of {data} after it")
    else:
        json_file, folder = Path(data), Path(images)
    categories = read_categories(train_json) if train_json else None
    dataset, problems = read_coco(json_file, folder, categories=categories, decode=decode)
    content = "not usable as it is"
    if dataset is not None:
        instances = [instance for record in dataset.records for instance in record["annotations"]]
        used = {instance["category_id"] for instance in instances}
        content = (
            f"{len(dataset.records)} images, {sum(not i['iscrowd'] for i in instances)} instances and "
            f"{sum(i['iscrowd'] for i in instances)} crowd regions of {len(used)} categories (of {len(dataset.names)})"
        )
        without = {r["image_id"] for r in dataset.records} - {r["image_id"] for r in dataset.learnable}
        problems += [
            Problem(
                action=Action.LEFT_OUT,
                what="image without an instance",
                detail="of training, unless dataset.train.keep_empty=true; it is evaluated on",
                image=record["image_id"],
                file_name=Path(record["file_name"]).name,
            )
            for record in dataset.records
            if record["image_id"] in without
        ]
    return _refused_first(problems), content


def _refused_first(problems: Sequence[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: list(Action).index(problem.action))
