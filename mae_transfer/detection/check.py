"""What is wrong with the image files of a COCO data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mae_transfer.data.look import ImageFacts, storage_notes
from mae_transfer.data.problems import Action, Problem


def image_problems(record: dict[str, Any], facts: ImageFacts) -> list[Problem]:
    """What is wrong with the image file of a record in Detectron2's format."""
    name = record["file_name"]

    def problem(action: Action, what: str, detail: str) -> Problem:
        return Problem(action=action, what=what, detail=detail, image=record["image_id"], file_name=Path(name).name)

    if facts.fault is not None:
        return [problem(Action.REFUSED, "image that cannot be read", facts.fault)]
    size, expected = (facts.height, facts.width), (record["height"], record["width"])
    if size != expected:
        how = " after the rotation that its EXIF entry asks for" if facts.stored_turned else ""
        return [
            problem(
                Action.REFUSED,
                "image of another size than the json says",
                f"it is {size[1]}x{size[0]} pixels{how}, the json says {expected[1]}x{expected[0]}; correct the json, "
                "or store the image as it was annotated",
            )
        ]
    return [problem(Action.REPAIRED, what, detail) for what, detail in storage_notes(facts)]
