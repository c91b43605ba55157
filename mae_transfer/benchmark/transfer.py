"""What the benchmarks of both hosts share: a setting, the backbone's runs, the command line, the tables.

A host's module describes itself by a ``Comparison``: the peer's name, its settings, and a ``Run`` for every part.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mae_transfer.benchmark.measure import (
    Contestant,
    Spread,
    Timing,
    environment,
    peak_memory,
    race,
    ratios,
    table,
    write_json,
)
from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.errors import ConfigError, RunFailed
from mae_transfer.sizes import get_size

OURS = "ours"
_KEEP = "-keep"  # ends the names of peers to which the allocator setting of our training is given too
_AGREEMENT = 1e-3  # of two images' features, which are of order 1, in fp32


@dataclass(frozen=True, kw_only=True)
class Setting(ABC):
    """What is computed: a host's recipe at a size."""

    size: str = "base"
    image_size: int = 512
    batch_size: int = 1
    precision: str = "fp32"
    seed: int = 0

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def images(self) -> Tensor:
        """(N, 3, H, W) of noise."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=generator)

    @abstractmethod
    def imports(self) -> None:
        """Load the host's libraries."""

    @abstractmethod
    def backbone(self, *, peer: bool) -> nn.Module:
        """Encoder and pyramid: ours, or the peer's with the weights of ours."""


def maps_of(features: Mapping[str, Tensor] | Sequence[Tensor]) -> list[Tensor]:
    """A backbone's maps, whether the host has them by name or in order."""
    return list(features.values() if isinstance(features, Mapping) else features)


def check_same_maps(setting: Setting, images: Tensor, peer: str) -> None:
    """Raises RunFailed unless both backbones give the same maps of ``images``."""
    ours, theirs = (setting.backbone(peer=is_peer).train(False) for is_peer in (False, True))
    with torch.no_grad():
        pairs = zip(maps_of(ours(images)), maps_of(theirs(images)), strict=True)
        worst = max((found - expected).abs().max().item() for found, expected in pairs)
    if not worst <= _AGREEMENT:
        raise RunFailed(f"features of ours and of {peer} differ by {worst:.6f}: not the same computation")


class Run(Contestant):
    """A part of the benchmark by one of the contestants.

    Args:
        name: "ours", the peer's name, or that with "-keep".
    """

    def __init__(self, name: str, setting: Any) -> None:
        self.name = name
        self.setting = setting
        self.peer = name != OURS
        self.keep = not self.peer or name.endswith(_KEEP)  # our training has the allocator keep what is freed

    def imports(self) -> None:
        self.setting.imports()
        if self.keep:
            keep_freed_memory()


class Forward(Run):
    def set_up(self) -> None:
        self.backbone = self.setting.backbone(peer=self.peer).train(False)  # mmseg's eval() returns nothing
        self.images = self.setting.images()

    def turn(self) -> None:
        with torch.no_grad(), self.setting.autocast():
            self.backbone(self.images)


class ForwardBackward(Run):
    def set_up(self) -> None:
        self.backbone = self.setting.backbone(peer=self.peer)
        self.backbone.train()
        self.images = self.setting.images()

    def turn(self) -> None:
        with self.setting.autocast():
            maps = maps_of(self.backbone(self.images))
        torch.stack([x.float().square().mean() for x in maps]).sum().backward()
        self.backbone.zero_grad(set_to_none=True)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A host's benchmark.

    Attributes:
        peer: its name, as contestants have it.
        setting: the class of its settings.
        parts: what is measured, by name.
        runs: of every part that is measured by turns; "memory" is measured in processes of their own.
        default: parts that are measured unless others are named.
        single: parts that take one image whatever the batch size.
        check: raises RunFailed where ours and the peer do not compute the same.
        others: parts that measure by themselves, from the command line to results.
    """

    peer: str
    setting: type[Setting]
    parts: Mapping[str, str]
    runs: Mapping[str, type[Run]]
    default: Sequence[str]
    single: Sequence[str]
    check: Callable[[str], None]
    others: Mapping[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = field(default_factory=dict)

    @property
    def contestants(self) -> tuple[str, ...]:
        return OURS, self.peer, self.peer + _KEEP


def add_arguments(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """What the benchmarks of both hosts accept."""
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=comparison.parts,
        default=list(comparison.default),
        help="; ".join(f"{name}: {about}" for name, about in comparison.parts.items())
        + f" (default: {' '.join(comparison.default)})",
    )
    parser.add_argument("--size", default="base", help="tiny, small, base or large (default: %(default)s)")
    parser.add_argument("--image-size", type=int, nargs="+", default=[512], help="pixels, one or more (default: 512)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="(both)")
    parser.add_argument("--batch-size", type=int, default=1, help="images a step (default: %(default)s)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=comparison.contestants,
        default=[OURS, comparison.peer],
        help="the first is held against the others. “keep” is the allocator setting that our training uses on CPUs, "
        f"given to the peer too (default: {OURS} {comparison.peer})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all: %(default)s)")
    parser.add_argument("--max-seconds", type=float, help="of each part: begin no further round after so long")
    parser.add_argument("--json", metavar="FILE", help="write every number there too")


def run(arguments: argparse.Namespace, comparison: Comparison) -> int:
    """Raises ConfigError for counts below 1 and sizes without the peer's counterpart."""
    if min(arguments.rounds, arguments.threads, arguments.batch_size, *arguments.image_size) < 1:
        raise ConfigError("--rounds, --threads, --batch-size and --image-size must be at least 1")
    if any(side % 32 for side in arguments.image_size):
        raise ConfigError("--image-size must be a multiple of 32, the largest stride of the pyramid")
    if get_size(arguments.size).patch_size != 16:
        raise ConfigError(
            f"--size {arguments.size}: the peer's models have patches of 16 px; use tiny, small, base or large"
        )
    facts = environment(arguments.threads)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    results: list[dict[str, Any]] = []
    if set(arguments.parts) & set(comparison.runs):
        comparison.check(arguments.size)
    for part in arguments.parts:
        if part in comparison.others:
            results += comparison.others[part](arguments)
            continue
        for image_size in arguments.image_size:
            for precision in arguments.precision:
                setting = comparison.setting(
                    size=arguments.size,
                    image_size=image_size,
                    batch_size=1 if part in comparison.single else arguments.batch_size,
                    precision=precision,
                )
                results.append(_measure(part, setting, arguments, comparison))
    write_json(arguments.json, {"environment": facts, "results": results})
    return 0


def _measure(part: str, setting: Setting, arguments: argparse.Namespace, comparison: Comparison) -> dict[str, Any]:
    print(
        f"\n{comparison.parts[part]}: {setting.size}, {setting.image_size} px, "
        f"batch {setting.batch_size}, {setting.precision}"
    )
    contestants = [comparison.runs[part](name, setting) for name in arguments.contestants]
    facts = {"part": part, **asdict(setting)}
    if part == "memory":
        peaks = peak_memory(contestants, turns=2, threads=arguments.threads)
        print(memory_table(peaks))
        return {**facts, "memory_bytes": peaks}
    timings = race(contestants, rounds=arguments.rounds, threads=arguments.threads, max_seconds=arguments.max_seconds)
    print(speed_table(timings))
    memory = {timing.name: timing.memory_bytes for timing in timings}
    return {**facts, "seconds": {timing.name: timing.seconds for timing in timings}, "memory_bytes": memory}


def speed_table(timings: Sequence[Timing]) -> str:
    """The first is held against the others: a ratio above 1 says that it is so many times as fast."""
    first = timings[0]
    rows = [
        [
            timing.name,
            Spread.of(timing.seconds).show(3),
            "" if timing is first else ratios(timing.seconds, first.seconds).show(),
            f"{timing.memory_bytes / 2**30:.2f}",
        ]
        for timing in timings
    ]
    return table(["", "seconds", f"{first.name} is faster by", "peak GiB"], rows)


def memory_table(peaks: dict[str, int]) -> str:
    """The first one's share of each other's peak."""
    first = next(iter(peaks.values()))
    rows = [[name, f"{peak / 2**30:.2f}", f"{first / peak:.2f}"] for name, peak in peaks.items()]
    return table(["", "peak GiB above imports", "first over this"], rows)
