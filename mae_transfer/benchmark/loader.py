"""Images a second and core: this loader and a literal torchvision/Pillow pipeline, on the same files, in turns."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

from mae_transfer.data.find import open_source
from mae_transfer.data.sampler import StepSampler
from mae_transfer.data.source import Source, scan_folders
from mae_transfer.data.transforms import normalise
from pretrain.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from pretrain.images import MaskedBatch, MaskedImages
from pretrain.masking import MaskSampler, build_sampler

_SCALE = (0.2, 1.0)  # paper, Table 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tools/benchmark.py loader`` accepts."""
    parser.add_argument("--data", type=Path, help="folder of image files (default: 500x375 JPEGs made for the purpose)")
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each contestant, taking turns (default: %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="images a round (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=0, help="also measure a DataLoader of so many processes (default: none)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.data or write_photos(Path(temporary), count=64)
        paths = scan_folders([folder])
        size = sum(path.stat().st_size for path in paths) / len(paths)
        print(
            f"{len(paths)} files, {size / 1000:.0f} kB on average; crops of {arguments.size} px, one core, one thread"
        )
        for repeats in (1, 2):
            _compare(arguments, folder, paths, repeats)
        if arguments.workers:
            _compare_loaders(arguments, folder, paths)
    return 0


def _compare(arguments: argparse.Namespace, folder: Path, paths: Sequence[Path], repeats: int) -> None:
    batch, rounds = arguments.batch, max(1, arguments.images // arguments.batch)
    pillow = PillowPipeline(paths, size=arguments.size)
    ours = MaskedImages(
        open_source([folder]),
        data=DataConfig(path=str(folder), image_size=arguments.size, repeats=repeats),
        sampler=_sampler(arguments.size),
        seed=0,
    )
    keys = list(_steps(len(paths), batch, rounds * arguments.rounds + 1, repeats))
    count = 0

    def pillow_round() -> None:
        for start in range(rounds):
            default_collate([pillow[(start * batch + i) % len(pillow)] for i in range(batch)])

    def our_round(finish: Callable[[MaskedBatch], object]) -> None:
        nonlocal count
        for _ in range(rounds):
            finish(ours.__getitems__(keys[count % len(keys)]))
            count += 1

    def normalised(made: MaskedBatch) -> Tensor:
        return normalise(made.images, IMAGENET_MEAN, IMAGENET_STD)

    contestants = {
        "torchvision/Pillow": pillow_round,
        "ours (uint8, normalised on the device)": lambda: our_round(lambda made: made),
        "ours, normalised here": lambda: our_round(normalised),
    }
    print(f"{repeats} crop{'s' if repeats > 1 else ''} of each decoded image, crops a second:")
    _print_table(take_turns(contestants, rounds=arguments.rounds), images=rounds * batch)


def _compare_loaders(arguments: argparse.Namespace, folder: Path, paths: Sequence[Path]) -> None:
    batch, rounds = arguments.batch, max(1, arguments.images // arguments.batch)
    source = open_source([folder])

    def theirs() -> None:
        dataset = PillowPipeline([paths[i % len(paths)] for i in range(rounds * batch)], size=arguments.size)
        for _ in DataLoader(dataset, batch, shuffle=True, num_workers=arguments.workers):
            pass

    def ours() -> None:
        for _ in our_loader(source, size=arguments.size, batch=batch, steps=rounds, workers=arguments.workers):
            pass

    print(f"a DataLoader of {arguments.workers} processes from start to end, crops a second:")
    contestants = {"torchvision/Pillow": theirs, "ours (uint8, normalised on the device)": ours}
    _print_table(take_turns(contestants, rounds=arguments.rounds), images=rounds * batch)


def our_loader(source: Source, *, size: int, batch: int, steps: int, workers: int) -> DataLoader[MaskedBatch]:
    """The training loader of ``steps`` batches."""
    dataset = MaskedImages(source, data=DataConfig(path=".", image_size=size), sampler=_sampler(size), seed=0)
    sampler = StepSampler(num_samples=len(source), batch_size=batch, seed=0, stop_step=steps)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_is, num_workers=workers)


def _as_is(batch: Any) -> Any:
    return batch


def _sampler(size: int) -> MaskSampler:
    patches = max(1, size // 16)
    return build_sampler("random", (patches, patches), 0.75)


def _steps(num_samples: int, batch: int, steps: int, repeats: int) -> StepSampler:
    return StepSampler(num_samples=num_samples, batch_size=batch, seed=0, stop_step=steps, repeats=repeats)


class PillowPipeline(Dataset[Tensor]):
    """What the original's and most other training scripts do for each image, to the letter."""

    def __init__(self, paths: Sequence[Path], *, size: int) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale=_SCALE, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with self.paths[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def take_turns(contestants: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the contestants called one after the other in every round, after a round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, call in contestants.items():
            before = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def _print_table(seconds: dict[str, list[float]], *, images: int) -> None:
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratios = [theirs / own for theirs, own in zip(first, values, strict=True)]
        speed = images / statistics.median(values)
        ratio = f"{statistics.median(ratios):.2f} x [{min(ratios):.2f}–{max(ratios):.2f}]"
        print(f"  {name:40s} {speed:7.0f}   {ratio}")


def write_photos(folder: Path, *, count: int, size: tuple[int, int] = (375, 500), quality: int = 90) -> Path:
    """JPEG files whose statistics are those of photos; returns ``folder``.

    Amplitudes fall off as 1 over frequency and the colours go together, as in natural images; hard-edged shapes lie in
    front. At quality 90 a file takes about as many bytes as ImageNet's do.
    """
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    for number in range(count):
        rng = np.random.default_rng(number)
        spectrum = np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency
        spectrum[:, 0, 0] = 0
        layers = np.fft.irfft2(spectrum, s=size)
        layers /= layers.std(axis=(1, 2), keepdims=True)
        pixels = 50 * layers[0] + 18 * layers[1:] + rng.uniform(90, 150, (3, 1, 1))
        for _ in range(8):
            centre, radius = rng.uniform(0, size), rng.uniform(15, 90, 2)
            inside = np.hypot((y - centre[0]) / radius[0], (x - centre[1]) / radius[1]) < 1
            pixels += inside * rng.uniform(-70, 70, (3, 1, 1))
        image = Image.fromarray(np.moveaxis(pixels.clip(0, 255), 0, 2).astype(np.uint8))
        image.save(folder / f"{number:04d}.jpg", quality=quality)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
