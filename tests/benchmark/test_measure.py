"""The arithmetic of the benchmarks, and that contestants take turns in processes of their own."""

from __future__ import annotations

import time

import pytest
import torch

from mae_transfer.benchmark.measure import Contestant, MatrixProducts, Spread, Timing, peak_memory, race, ratios, table
from mae_transfer.errors import ConfigError, RunFailed


class Sleeper(Contestant):
    def __init__(self, name: str, seconds: float, megabytes: int = 0) -> None:
        self.name, self.seconds, self.megabytes = name, seconds, megabytes
        self.flops = 2e9

    def set_up(self) -> None:
        self.block = torch.ones(self.megabytes * 2**18)
        self.turns = 0

    def turn(self) -> None:
        self.turns += 1
        time.sleep(self.seconds * (10 if self.turns == 1 else 1))  # the first is a warm-up


class Refused(Sleeper):
    def set_up(self) -> None:
        raise ConfigError("such a thing cannot be built")


class Killed(Sleeper):
    def turn(self) -> None:
        raise SystemExit


def test_ratios_are_of_the_same_round() -> None:
    assert ratios([4.0, 9.0, 8.0], [2.0, 3.0, 4.0]) == Spread(2.0, 2.0, 3.0)
    assert Spread.of([3.0, 1.0, 2.0]).show(1) == "2.0 [1.0–3.0]"
    assert Timing("a", 6e9, [2.0, 3.0]).gflops == [3.0, 2.0]


def test_operations_of_matrix_products() -> None:
    assert MatrixProducts("bf16", [(2, 3, 5), (1, 4, 4)]).flops == 2 * (2 * 3 * 5 + 4 * 4)


def test_a_race_counts_turns_after_the_warm_up_and_memory_after_the_imports() -> None:
    slow, fast = race([Sleeper("slow", 0.06), Sleeper("fast", 0.02, megabytes=64)], rounds=3, threads=1)
    assert len(slow.seconds) == len(fast.seconds) == 3
    assert all(0.06 <= seconds < 0.3 for seconds in slow.seconds)
    assert ratios(slow.seconds, fast.seconds).median == pytest.approx(3, rel=0.5)
    assert 64 <= fast.memory_bytes / 2**20 < 100
    assert slow.memory_bytes / 2**20 < 30


def test_the_time_limit_ends_the_race_after_a_whole_round() -> None:
    both = race([Sleeper("a", 0.01), Sleeper("b", 0.01)], rounds=5, threads=1, max_seconds=0.0)
    assert [len(timing.seconds) for timing in both] == [1, 1]


def test_peak_memory_of_each() -> None:
    peaks = peak_memory([Sleeper("large", 0, megabytes=96), Sleeper("small", 0)], turns=1, threads=1)
    assert peaks["large"] - peaks["small"] == pytest.approx(96 * 2**20, abs=16 * 2**20)


def test_what_a_contestant_raises_arrives_here() -> None:
    with pytest.raises(ConfigError, match="cannot be built"):
        race([Refused("a", 0)], rounds=1, threads=1)
    with pytest.raises(RunFailed, match="too little memory"):
        race([Killed("a", 0)], rounds=1, threads=1)


def test_columns_line_up() -> None:
    assert table(["", "s"], [["ours", "1.25"], ["a peer", "12"]]).splitlines() == [
        "           s",
        "------  ----",
        "ours    1.25",
        "a peer    12",
    ]
