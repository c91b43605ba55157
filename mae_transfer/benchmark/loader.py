"""Images a second and core: this loader and a literal torchvision/Pillow pipeline, on the same files, in turns."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mae_transfer.benchmark.measure import Contestant, Spread, Timing, environment, race, ratios, table, write_json
from mae_transfer.benchmark.peers import literal_transform
from mae_transfer.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from mae_transfer.data.find import open_source
from mae_transfer.data.sampler import StepSampler
from mae_transfer.data.source import scan_folders
from mae_transfer.data.transforms import normalise
from mae_transfer.errors import ConfigError
from pretrain.config import DataConfig
from pretrain.images import MaskedImages
from pretrain.masking import build_sampler

_PATCHES = (14, 14)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tools/benchmark.py loader`` accepts."""
    parser.add_argument("--data", type=Path, help="folder of image files (default: 500x375 JPEGs made for the purpose)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the crops (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 2], help="crops of each decoded image (1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="of each contestant, taking turns (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=4, help="a round (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="measure a DataLoader of so many processes as well")
    parser.add_argument("--json", metavar="FILE", help="write every number there too")


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for counts below 1. DataError: no images in ``--data``."""
    counts = (arguments.image_size, arguments.batch_size, arguments.rounds, arguments.batches, *arguments.repeats)
    if min(counts) < 1:
        raise ConfigError("--image-size, --batch-size, --rounds, --batches and --repeats must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.data or write_photos(Path(temporary), number=64)
        paths = scan_folders([folder])
        size = sum(path.stat().st_size for path in paths) / len(paths)
        setting = Setting(
            folder=folder,
            image_size=arguments.image_size,
            batch_size=arguments.batch_size,
            batches=arguments.batches,
        )
        facts = environment(threads=1)
        print(f"{facts['processor']}, torch {facts['torch']}, {facts['date']}")
        print(f"{len(paths)} files of {size / 1000:.0f} kB on average, crops of {arguments.image_size} px, one core")
        results: dict[str, Any] = {"environment": facts, "files": len(paths), "mean_bytes": size}
        for repeats in arguments.repeats:
            contestants = [Pillow(setting), *(Ours(setting, repeats=repeats, normalised=n) for n in (False, True))]
            timings = race(contestants, rounds=arguments.rounds, threads=1)
            print(f"\n{repeats} crop{'s' if repeats > 1 else ''} of each decoded image")
            results[f"repeats={repeats}"] = _report(timings, setting)
        if arguments.workers:
            print(f"\na DataLoader of {arguments.workers} processes, from its start to its end")
            results[f"workers={arguments.workers}"] = _report(_loaders(setting, arguments), setting)
        write_json(arguments.json, results)
    return 0


def _report(timings: Sequence[Timing], setting: Setting) -> dict[str, Any]:
    """Print a table; the first contestant is what the others are held against."""
    rows, figures = [], {}
    for timing in timings:
        speed = Spread.of([setting.images / seconds for seconds in timing.seconds])
        gain = ratios(timings[0].seconds, timing.seconds)
        rows.append([timing.name, speed.show(0), gain.show()])
        figures[timing.name] = {"images_per_second": vars(speed), "ratio": vars(gain)}
    print(table(["", "crops/s", "ratio"], rows))
    return figures


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every contestant does in a turn: ``batches`` batches of ``batch_size`` crops of the files of ``folder``."""

    folder: Path
    image_size: int
    batch_size: int
    batches: int

    @property
    def images(self) -> int:
        return self.batch_size * self.batches


class Pillow(Contestant):
    """What the original's and most other training scripts do in a worker, to the letter."""

    name = "torchvision/Pillow"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def set_up(self) -> None:
        self.dataset = PillowImages(scan_folders([self.setting.folder]), size=self.setting.image_size)
        self.next = count()

    def turn(self) -> None:
        for _ in range(self.setting.batches):
            images = [self.dataset[next(self.next) % len(self.dataset)] for _ in range(self.setting.batch_size)]
            default_collate([(image, 0) for image in images])


class Ours(Contestant):
    """What ours does in a worker: uint8 batches, with the noise of the masks.

    Args:
        normalised: float32 with mean and deviation taken out, too, which otherwise the device does.
    """

    def __init__(self, setting: Setting, *, repeats: int, normalised: bool) -> None:
        self.name = "ours, normalised as well" if normalised else "ours (uint8; the device normalises)"
        self.setting = setting
        self.repeats = repeats
        self.normalised = normalised

    def set_up(self) -> None:
        self.dataset, sampler = our_images(self.setting, steps=10_000, repeats=self.repeats)
        self.keys = iter(sampler)

    def turn(self) -> None:
        for _ in range(self.setting.batches):
            batch = self.dataset.__getitems__(next(self.keys))
            if self.normalised:
                normalise(batch.images, IMAGENET_MEAN, IMAGENET_STD)


def our_images(setting: Setting, *, steps: int, repeats: int = 1) -> tuple[MaskedImages, StepSampler]:
    """The training data of ``steps`` steps, and what comes when."""
    data = DataConfig(path=str(setting.folder), image_size=setting.image_size, repeats=repeats)
    source = open_source([setting.folder])
    images = MaskedImages(source, data=data, sampler=build_sampler("random", _PATCHES, 0.75), seed=0)
    sampler = StepSampler(
        num_samples=len(source), batch_size=setting.batch_size, seed=0, stop_step=steps, repeats=repeats
    )
    return images, sampler


class PillowImages(Dataset[Tensor]):
    """The transforms of the paper's code."""

    def __init__(self, paths: Sequence[Path], *, size: int) -> None:
        self.paths = paths
        self.transform = literal_transform(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with self.paths[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def _loaders(setting: Setting, arguments: argparse.Namespace) -> list[Timing]:
    """Both as training uses them, worker processes, hand-over and all. Here, as no contestant may have children."""
    paths = scan_folders([setting.folder])
    dataset = PillowImages([paths[i % len(paths)] for i in range(setting.images)], size=setting.image_size)
    ours, sampler = our_images(setting, steps=setting.batches)
    loaders: dict[str, Callable[[], DataLoader[Any]]] = {
        Pillow.name: lambda: DataLoader(dataset, setting.batch_size, shuffle=True, num_workers=arguments.workers),
        "ours (uint8; the device normalises)": lambda: DataLoader(
            ours, batch_sampler=sampler, collate_fn=_as_is, num_workers=arguments.workers
        ),
    }
    timings = [Timing(name, 0.0) for name in loaders]
    for round_ in range(arguments.rounds + 1):
        for timing, make in zip(timings, loaders.values(), strict=True):
            before = time.perf_counter()
            for _ in make():
                pass
            if round_:
                timing.seconds.append(time.perf_counter() - before)
    return timings


def _as_is(batch: Any) -> Any:
    return batch


def write_photos(folder: Path, *, number: int, size: tuple[int, int] = (375, 500), quality: int = 92) -> Path:
    """JPEG files whose statistics are those of photos; returns ``folder``.

    Amplitudes fall off with frequency and the colours go together, as in natural images; hard-edged shapes lie in
    front. A file takes about as many bytes as ImageNet's do.
    """
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    for index in range(number):
        rng = np.random.default_rng(index)
        spectrum = np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency**1.25
        spectrum[:, 0, 0] = 0
        layers = np.fft.irfft2(spectrum, s=size)
        layers /= layers.std(axis=(1, 2), keepdims=True)
        pixels = 50 * layers[0] + 18 * layers[1:] + rng.uniform(90, 150, (3, 1, 1))
        for _ in range(8):
            centre, radius = rng.uniform(0, size), rng.uniform(15, 90, 2)
            inside = np.hypot((y - centre[0]) / radius[0], (x - centre[1]) / radius[1]) < 1
            pixels += inside * rng.uniform(-70, 70, (3, 1, 1))
        image = Image.fromarray(np.moveaxis(pixels.clip(0, 255), 0, 2).astype(np.uint8))
        image.save(folder / f"{index:04d}.jpg", quality=quality)
    return folder
