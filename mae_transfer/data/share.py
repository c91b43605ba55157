"""A share of a labelled data set: the same images whatever the order in which they are listed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from mae_transfer.errors import ConfigError

Name = TypeVar("Name", str, int)


def choose_share(names: Sequence[Name], fraction: float, *, seed: int, key: str) -> list[Name]:
    """A share of ``names``, in their order, chosen by ``seed`` and each name alone.

    A smaller share of the same seed lies within a larger one, so that runs on 25 % and 50 % of the labels differ by
    what is added, not by what was drawn.

    Args:
        names: distinct.
        fraction: above 0 and at most 1; at least one name is kept.
        key: the setting that the fraction was given by, for the message.

    Raises:
        ConfigError: another fraction.
    """
    check_share(fraction, key)
    if fraction == 1 or not names:
        return list(names)
    lots = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    chosen = set(lots[: max(1, round(fraction * len(names)))])
    return [name for name in names if name in chosen]


def check_share(fraction: float, key: str) -> None:
    """Raises ConfigError where ``fraction`` is not above 0 and at most 1."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"{key}={fraction}: expected a share above 0 and at most 1")
