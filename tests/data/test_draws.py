from __future__ import annotations

import numpy as np
import pytest

from mae_transfer.data.draws import Draws, Purpose, permutation


def test_a_draw_depends_on_its_address_alone() -> None:
    address = {"seed": 3, "purpose": Purpose.CROP, "epoch": 7, "index": 11}
    alone = Draws(**address).words(5)
    Draws(**{**address, "index": 10}).words(1000)
    np.testing.assert_array_equal(Draws(**address).words(5), alone)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"purpose": Purpose.MASK}, {"epoch": 8}, {"index": 12}, {"view": 1}])
def test_every_part_of_the_address_counts(changed: dict[str, int]) -> None:
    address = {"seed": 3, "purpose": Purpose.CROP, "epoch": 7, "index": 11}
    assert not np.isin(Draws(**{**address, **changed}).words(50), Draws(**address).words(50)).any()


def test_the_stream_is_philox_as_numpy_defines_it() -> None:
    counter = 11 * 2**128 + 7 * 2**192
    expected = np.random.Philox(key=3 + 2 * 2**64, counter=counter).random_raw(4)
    np.testing.assert_array_equal(Draws(seed=3, purpose=Purpose.CROP, epoch=7, index=11).words(4), expected)
    second = np.random.Philox(key=3 + 2 * 2**64, counter=counter + 2**64).random_raw(4)
    np.testing.assert_array_equal(Draws(seed=3, purpose=Purpose.CROP, epoch=7, index=11, view=1).words(4), second)


def test_uniform_values_are_uniform_across_addresses() -> None:
    values = np.array(
        [Draws(seed=0, purpose=Purpose.CROP, epoch=e, index=i).uniform(1)[0] for e in range(4) for i in range(2500)]
    )
    assert values.min() >= 0 and values.max() < 1
    # Kolmogorov-Smirnov against the uniform distribution; 1.95/sqrt(n) is passed by one sample in a thousand.
    gap = np.abs(np.sort(values) - (np.arange(values.size) + 0.5) / values.size).max()
    assert gap < 1.95 / np.sqrt(values.size)


def test_permutations_differ_by_epoch_and_are_complete() -> None:
    first, second = (permutation(seed=0, epoch=epoch, length=100) for epoch in (0, 1))
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(np.sort(second), np.arange(100))
    assert (first != second).sum() > 80
