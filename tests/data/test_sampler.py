from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_transfer.data.sampler import SampleKey, StepSampler, num_steps
from mae_transfer.errors import ConfigError


def sampler(**changes: int) -> StepSampler:
    return StepSampler(**{"num_samples": 10, "batch_size": 8, "seed": 0, "stop_step": 20, **changes})


@given(num_samples=st.integers(1, 30), batch_size=st.integers(1, 40), start=st.integers(0, 30))
def test_a_step_is_a_function_of_seed_and_step(num_samples: int, batch_size: int, start: int) -> None:
    whole = StepSampler(num_samples=num_samples, batch_size=batch_size, seed=5, stop_step=start + 3)
    resumed = StepSampler(num_samples=num_samples, batch_size=batch_size, seed=5, start_step=start, stop_step=start + 3)
    assert list(whole)[start:] == list(resumed) == [resumed.global_batch(step) for step in range(start, start + 3)]


@given(num_samples=st.integers(1, 30), batch_size=st.integers(1, 40))
def test_every_epoch_shows_every_image_once(num_samples: int, batch_size: int) -> None:
    steps = num_steps(epochs=3, num_samples=num_samples, batch_size=batch_size)
    seen = Counter(
        key
        for step in range(steps)
        for key in StepSampler(num_samples=num_samples, batch_size=batch_size, seed=1, stop_step=steps).global_batch(
            step
        )
    )
    assert max(seen.values()) == 1
    assert all(SampleKey(epoch, index) in seen for epoch in range(3) for index in range(num_samples))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_processes_and_rounds_make_up_the_same_batch(world_size: int, accumulate: int) -> None:
    shares = [list(sampler(rank=rank, world_size=world_size, accumulate=accumulate)) for rank in range(world_size)]
    for step in range(20):
        together = [
            key
            for round_ in range(accumulate)
            for rank in range(world_size)
            for key in shares[rank][step * accumulate + round_]
        ]
        assert together == sampler().global_batch(step)


def test_seeds_differ() -> None:
    assert sampler().global_batch(0) != sampler(seed=1).global_batch(0)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="use a multiple of 6: 6 or 12"):
        sampler(world_size=3, accumulate=2)
    with pytest.raises(ConfigError, match=r"data\.repeats=3; use a multiple of 6: 6 or 12"):
        sampler(world_size=2, repeats=3)
    with pytest.raises(ConfigError, match="use a multiple of 16: 16"):
        sampler(repeats=16)
    with pytest.raises(ConfigError, match="no samples"):
        sampler(num_samples=0)


@given(
    num_samples=st.integers(1, 20),
    images=st.integers(1, 6),
    repeats=st.integers(1, 4),
    world_size=st.integers(1, 2),
    accumulate=st.integers(1, 2),
)
def test_views_of_an_image_come_together_in_one_micro_batch(
    num_samples: int, images: int, repeats: int, world_size: int, accumulate: int
) -> None:
    options = {
        "num_samples": num_samples,
        "batch_size": images * repeats * world_size * accumulate,
        "seed": 1,
        "stop_step": 4,
        "accumulate": accumulate,
        "repeats": repeats,
        "world_size": world_size,
    }
    shares = [list(StepSampler(**options, rank=rank)) for rank in range(world_size)]
    for step in range(4):
        rounds = [
            shares[rank][step * accumulate + round_] for round_ in range(accumulate) for rank in range(world_size)
        ]
        for keys in rounds:
            assert [key.view for key in keys] == list(range(repeats)) * images
            assert all(
                len({(key.epoch, key.index) for key in keys[i : i + repeats]}) == 1
                for i in range(0, len(keys), repeats)
            )
        together = [key for keys in rounds for key in keys]
        assert together == StepSampler(**options).global_batch(step)
        # The images are those of a run that shows each once, in batches of so many times fewer.
        once = StepSampler(num_samples=num_samples, batch_size=len(together) // repeats, seed=1, stop_step=4)
        assert [(key.epoch, key.index) for key in together[::repeats]] == [
            (key.epoch, key.index) for key in once.global_batch(step)
        ]


def test_an_epoch_decodes_every_image_once() -> None:
    assert num_steps(epochs=3, num_samples=10, batch_size=8, repeats=2) == num_steps(
        epochs=3, num_samples=10, batch_size=4
    )
