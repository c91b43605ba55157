"""The pretraining step: forward, backward and AdamW of ours and of Hugging Face's ViTMAE, in turns.

With ``--data`` a turn also prepares its images, by our loader and by a literal torchvision pipeline.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mae_transfer.benchmark.measure import (
    Contestant,
    MatrixProducts,
    Spread,
    Timing,
    environment,
    peak_memory,
    race,
    ratios,
    table,
    write_json,
)
from mae_transfer.benchmark.peers import hugging_face, literal_transform
from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.engine.optimizer import OptimConfig, build_adamw, decay_groups
from mae_transfer.errors import ConfigError, require
from pretrain.model import MaskedAutoencoder, build_mae
from pretrain.planner import training_flops

CONTESTANTS = ("ours-bf16", "ours-fp32", "hf-bf16", "hf-bf16-keep", "hf-fp32")
GENERATED = "generated"
_GENERATED_IMAGES = 512


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the benchmark: which model, on what."""

    size: str
    image_size: int
    patch_size: int | None
    batch_size: int
    data: str | None = None
    checkpointing: bool = False
    seed: int = 0

    def model(self) -> MaskedAutoencoder:
        torch.manual_seed(self.seed)
        patch: dict[str, Any] = {} if self.patch_size is None else {"patch_size": self.patch_size}
        return build_mae(size=self.size, image_size=self.image_size, checkpointing=self.checkpointing, **patch)

    def flops(self) -> float:
        """Counted operations of a step, by ours: what the training needs, whoever computes it."""
        with torch.device("meta"):
            return float(training_flops(self.model()) * self.batch_size)

    def product_shapes(self) -> list[tuple[int, int, int]]:
        """The products of the encoder's and of the decoder's MLP at this batch: (tokens, width, hidden)."""
        with torch.device("meta"):
            model = self.model()
        num_patches = model.grid[0] * model.grid[1]
        encoded = self.batch_size * (1 + int(num_patches * (1 - model.mask_ratio)))
        decoded = self.batch_size * (1 + num_patches)
        shapes = []
        for tokens, width in ((encoded, model.width), (decoded, model.decoder_width)):
            shapes += [(tokens, width, 4 * width), (tokens, 4 * width, width)]
        return shapes


class Step(Contestant):
    """A training step of either implementation."""

    def __init__(self, setting: Setting, *, peer: bool, precision: str, keep: bool) -> None:
        self.setting = setting
        self.peer = peer
        self.precision = precision
        self.keep = keep
        self.name = f"{'hf' if peer else 'ours'}-{precision}{'-keep' if peer and keep else ''}"
        self.flops = setting.flops()

    def imports(self) -> None:
        if self.peer:
            require("transformers", "test").ViTMAEForPreTraining  # noqa: B018  # loaded when it is named
        if self.keep:
            keep_freed_memory()

    def set_up(self) -> None:
        model = self.setting.model()
        config = OptimConfig()
        self.model: nn.Module = hugging_face(model) if self.peer else model.train()
        # For the peer too what transformers' Trainer uses: torch's fused AdamW, decay on all but biases and norms.
        self.optimizer = build_adamw(decay_groups(self.model, config.weight_decay), config)
        if self.setting.data is None:
            size = self.setting.image_size
            images = torch.randn(self.setting.batch_size, 3, size, size)
            self.batches: Iterator[tuple[Tensor, Tensor | None]] = _forever(images)
        elif self.peer:
            self.batches = literal_batches(self.setting)
        else:
            self.batches = our_batches(self.setting, model)

    def turn(self) -> None:
        images, noise = next(self.batches)
        autocast = torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with autocast:
            loss = self.model(images, noise=noise).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _forever(images: Tensor) -> Iterator[tuple[Tensor, None]]:
    while True:
        yield images, None


def our_batches(setting: Setting, model: MaskedAutoencoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Our loader in the training process, as ``configs/pretrain/tiny.yaml`` has it, but without its cache."""
    from mae_transfer.data.batches import UnreadableCount, batch_stream, open_images
    from mae_transfer.data.sampler import StepSampler
    from mae_transfer.data.transforms import normalise
    from pretrain.config import DataConfig
    from pretrain.images import MaskedImages
    from pretrain.masking import build_sampler

    data = DataConfig(path=setting.data, image_size=setting.image_size, workers=0, scan_cache=False)
    source = open_images(data, data.roots)
    masks = build_sampler("random", model.grid, model.mask_ratio)
    sampler = StepSampler(num_samples=len(source), batch_size=setting.batch_size, seed=0, stop_step=1_000_000)
    stream = batch_stream(
        MaskedImages(source, data=data, sampler=masks, seed=0),
        sampler,
        workers=0,
        pin_memory=False,
        count=UnreadableCount(num_samples=len(source), limit=0.0),
    )
    mean, std = data.normalisation
    for batch in stream:
        yield normalise(batch.images, mean, std), batch.noise


def literal_batches(setting: Setting) -> Iterator[tuple[Tensor, None]]:
    """torchvision's ImageFolder and transforms, as in the code of the paper, in the training process."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(setting.data), literal_transform(setting.image_size))
    loader = DataLoader(dataset, setting.batch_size, shuffle=True, drop_last=True)
    while True:
        for images, _ in loader:
            yield images, None


def generate_images(folder: Path, *, count: int, side: int) -> None:
    """JPEGs of smooth noise, landscape and portrait, in one class folder; the same ones each time."""
    from PIL import Image

    (folder / "images").mkdir()
    for index in range(count):
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        width, height = (side * 4 // 3, side) if index % 2 else (side, side * 4 // 3)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 8, (height, width, 3))
        pixels = np.clip(np.asarray(picture, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:04d}.jpg", quality=90)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="base", help="tiny, small, base, large or huge (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--patch-size", type=int, help="pixels; the size's own by default")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16], help="one or more (default: 16)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=["ours-bf16", "hf-bf16", "hf-bf16-keep", "hf-fp32"],
        help="the first is held against the others. “keep” is the allocator setting that our training uses on CPUs, "
        "given to the peer too (default: ours-bf16 hf-bf16 hf-bf16-keep hf-fp32)",
    )
    parser.add_argument(
        "--data",
        help=f"a folder of images in class folders, or “{GENERATED}”: a turn then also prepares its images, by our "
        "loader or by torchvision's ImageFolder and transforms (default: images are ready)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="ours recomputes activations")
    parser.add_argument("--peak-memory", action="store_true", help="no timing: peak memory of each, one after another")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all: %(default)s)")
    parser.add_argument("--max-seconds", type=float, help="begin no further round after so long")
    parser.add_argument("--json", metavar="FILE", help="write every number there too")


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for counts below 1."""
    if arguments.rounds < 1 or arguments.threads < 1 or min(arguments.batch_size) < 1:
        raise ConfigError("--rounds, --threads and --batch-size must be at least 1")
    facts = environment(arguments.threads)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    results = []
    with ExitStack() as stack:
        data = arguments.data
        if data == GENERATED:
            data = stack.enter_context(tempfile.TemporaryDirectory(prefix="mae-benchmark-"))
            generate_images(Path(data), count=_GENERATED_IMAGES, side=2 * arguments.image_size)
        for batch_size in arguments.batch_size:
            setting = Setting(
                size=arguments.size,
                image_size=arguments.image_size,
                patch_size=arguments.patch_size,
                batch_size=batch_size,
                data=data,
                checkpointing=arguments.checkpointing,
            )
            patch = "" if arguments.patch_size is None else f" patch {arguments.patch_size},"
            loader = "" if data is None else ", images prepared in the step"
            print(f"\n{setting.size},{patch} {setting.image_size} px, batch {batch_size}{loader}")
            contestants = [_contestant(name, setting) for name in arguments.contestants]
            results.append({"batch_size": batch_size, **_measure(contestants, setting, arguments)})
    write_json(arguments.json, {"environment": facts, "arguments": vars_of(arguments), "results": results})
    return 0


def _contestant(name: str, setting: Setting) -> Step:
    who, precision, *keep = name.split("-")
    # Ours trains with the allocator keeping what is freed (engine/allocator.py); the peer does where asked to.
    return Step(setting, peer=who == "hf", precision=precision, keep=who == "ours" or bool(keep))


def _measure(contestants: Sequence[Step], setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.peak_memory:
        peaks = peak_memory(contestants, turns=2, threads=arguments.threads)
        print(memory_table(peaks))
        return {"memory_bytes": peaks}
    ceilings = [MatrixProducts(precision, setting.product_shapes()) for precision in ("bf16", "fp32")]
    timings = race(
        [*contestants, *ceilings],
        rounds=arguments.rounds,
        threads=arguments.threads,
        warm_up=2,
        max_seconds=arguments.max_seconds,
    )
    print(speed_table(timings[: len(contestants)], timings[len(contestants)], setting.batch_size))
    for ceiling in timings[len(contestants) :]:
        print(f"{ceiling.name} of these shapes: {Spread.of(ceiling.gflops).show(0)} GFLOP/s")
    return {"seconds": {t.name: t.seconds for t in timings}, "flops": {t.name: t.flops for t in timings}}


def speed_table(timings: Sequence[Timing], ceiling: Timing, batch_size: int) -> str:
    """Ours is the first; a ratio above 1 says that it is so many times as fast. Share: of the matrix-product rate."""
    ours = timings[0]
    rows = []
    for timing in timings:
        rows.append(
            [
                timing.name,
                Spread.of(timing.seconds).show(3),
                f"{batch_size / Spread.of(timing.seconds).median:.1f}",
                ratios(timing.seconds, ours.seconds).show() if timing is not ours else "",
                Spread.of(timing.gflops).show(0),
                ratios([100 * g for g in timing.gflops], ceiling.gflops).show(0),
            ]
        )
    head = ["", "seconds a step", "images/s", f"{ours.name} is faster by", "GFLOP/s counted", f"% of {ceiling.name}"]
    return table(head, rows)


def memory_table(peaks: dict[str, int]) -> str:
    """Ours is the first; its share of each other's peak."""
    ours = next(iter(peaks.values()))
    rows = [[name, f"{peak / 2**30:.2f}", f"{ours / peak:.2f}"] for name, peak in peaks.items()]
    return table(["", "peak GiB above imports", "first over this"], rows)


def vars_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as numbers and text."""
    kinds = (str, int, float, list, type(None))
    return {key: value for key, value in vars(arguments).items() if isinstance(value, kinds)}
