"""What is wrong with a labelled data set: every problem, with its image and annotation and what is done about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mae_transfer.errors import DataError


class Action(StrEnum):
    """What is done about a problem."""

    REFUSED = "refused"  # the data are not used until it is corrected
    LEFT_OUT = "left out"
    REPAIRED = "repaired"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        what: its kind, in the same words for every problem of the kind.
        detail: what was found, and what is done where the action alone does not say it.
        image, annotation: their ids, where there are such; the image's file where it is known.
        mask: the file of an image's labels, where these are in one.
    """

    action: Action
    what: str
    detail: str = ""
    image: Any = None
    file_name: str | None = None
    annotation: Any = None
    mask: str | None = None

    def __str__(self) -> str:
        place = []
        if self.image is not None:
            place.append(f"image {self.image}" + (f" ({self.file_name})" if self.file_name else ""))
        elif self.file_name is not None:
            place.append(f"image {self.file_name}")
        if self.mask is not None:
            place.append(f"mask {self.mask}")
        if self.annotation is not None:
            place.append(f"annotation {self.annotation}")
        return ": ".join([*([", ".join(place)] if place else []), self.what, *([self.detail] if self.detail else [])])


def summary(problems: Iterable[Problem]) -> list[str]:
    """A line for each kind of problem: how many there are, and the first of them."""
    first: dict[tuple[Action, str], Problem] = {}
    counts: Counter[tuple[Action, str]] = Counter()
    for problem in problems:
        kind = (problem.action, problem.what)
        first.setdefault(kind, problem)
        counts[kind] += 1
    return [
        f"{action}: {first[action, what]}" + (f" (and {count - 1} more of this kind)" if count > 1 else "")
        for (action, what), count in counts.items()
    ]


def refuse(problems: Sequence[Problem], data: str | Path) -> None:
    """Raises DataError, with the first of each kind, where a problem forbids using the data."""
    refused = [problem for problem in problems if problem.action is Action.REFUSED]
    if not refused:
        return
    lines = [line.removeprefix(f"{Action.REFUSED}: ") for line in summary(refused)]
    more = "" if len(refused) == 1 else "; tools/check_dataset.py lists them all"
    raise DataError(f"{data}: {'; '.join(lines)}{more}")
