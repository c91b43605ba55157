"""Check labelled data before a run: what ``tools/check_dataset.py`` runs.

Detection data for now: a COCO or LVIS json and the folder of its images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mae_transfer.data.problems import Action, Problem
from mae_transfer.engine.files import write_text
from mae_transfer.errors import EXIT_BAD_INPUT, DataError

_EPILOG = """\
Exit status: 0 where the data can be used, with the repairs listed; 2 where something has to be corrected first.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, recognise the data, and report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="check_dataset.py",
        description="Report every problem of a data set, with the image and annotation it is of and what is done: "
        "refused (correct it first), left out, or repaired.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "data",
        metavar="JSON|NAME",
        help="annotations in COCO or LVIS format, or a name such as coco_2017_val (below DETECTRON2_DATASETS)",
    )
    parser.add_argument("images", nargs="?", metavar="IMAGES", help="the folder that the json's file names start from")
    parser.add_argument(
        "--train-json", metavar="JSON", help="the training annotations: those checked must number categories alike"
    )
    parser.add_argument(
        "--fast", action="store_true", help="look at the headers of images only, rather than decode them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too, one entry a problem")
    args = parser.parse_args(argv)
    if Path(args.data).is_dir():
        raise DataError(f"{args.data} is a folder; name a COCO json, and its image folder after it")

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
    return sorted(problems, key=lambda problem: list(Action).index(problem.action)), content
