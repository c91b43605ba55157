"""A share of a labelled data set."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from mae_transfer.data.share import choose_share
from mae_transfer.errors import ConfigError

NAMES = [f"image {index}" for index in range(40)]


def choose(fraction: float, seed: int = 0, names: list[str] = NAMES) -> list[str]:
    return choose_share(names, fraction, seed=seed, key="dataset.fraction")


def test_a_smaller_share_lies_within_a_larger_one() -> None:
    shares = [choose(fraction) for fraction in (0.01, 0.25, 0.5, 1.0)]
    assert [len(share) for share in shares] == [1, 10, 20, 40]
    for smaller, larger in pairwise(shares):
        assert set(smaller) < set(larger)


def test_the_choice_depends_on_seed_and_names_alone() -> None:
    shuffled = random.Random(1).sample(NAMES, len(NAMES))
    assert set(choose(0.25, names=shuffled)) == set(choose(0.25))
    assert choose(0.25, names=shuffled) == [name for name in shuffled if name in choose(0.25)]  # order kept
    assert set(choose(0.25, seed=1)) != set(choose(0.25))
    # An image that joins takes at most one place.
    assert len(set(choose(0.25)) - set(choose(0.25, names=[*NAMES, "another"]))) <= 1


@pytest.mark.parametrize("fraction", [0, -1, 1.5, float("nan")])
def test_other_shares_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.fraction=.*above 0 and at most 1"):
        choose(fraction)
