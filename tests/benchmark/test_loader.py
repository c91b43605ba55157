"""The loader's benchmark runs, and compares what it says it compares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_transfer.benchmark import loader
from mae_transfer.data.source import scan_folders
from mae_transfer.errors import ConfigError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    loader.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loader.write_photos(tmp_path_factory.mktemp("photos"), number=3)


def test_made_photos_are_like_photos(photos: Path) -> None:
    paths = scan_folders([photos])
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (500, 375) and image.mode == "RGB"
            pixels = np.asarray(image, np.float64)
        # As many bytes as ImageNet's files of that size; neighbours alike; no saturated mass.
        assert 70e3 < path.stat().st_size < 150e3
        assert np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1] > 0.9
        assert ((pixels == 0) | (pixels == 255)).mean() < 0.2
    assert len({path.read_bytes() for path in paths}) == 3


def test_it_runs_and_writes_every_figure(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--data",
        str(photos),
        "--image-size",
        "32",
        "--batch-size",
        "4",
        "--batches",
        "1",
        "--rounds",
        "2",
        "--repeats",
        "2",
    ]
    assert loader.run(arguments(*words, "--workers", "1", "--json", str(tmp_path / "figures.json"))) == 0
    text = capsys.readouterr().out
    for line in ("2 crops of each", "torchvision/Pillow", "a DataLoader of 1 processes"):
        assert line in text
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["files"] == 3
    for part in ("repeats=2", "workers=1"):
        speeds = {name: entry["images_per_second"]["median"] for name, entry in figures[part].items()}
        assert min(speeds.values()) > 0 and figures[part]["torchvision/Pillow"]["ratio"]["median"] == 1


def test_both_prepare_the_same_kind_of_images(photos: Path) -> None:
    """The same transforms of the same files: averages over many crops agree."""
    setting = loader.Setting(folder=photos, image_size=32, batch_size=30, batches=1)
    images, sampler = loader.our_images(setting, steps=10)
    ours = np.concatenate([images.__getitems__(keys).images.float().numpy() / 255 for keys in sampler])
    theirs_images = loader.PillowImages(scan_folders([photos]), size=32)
    theirs = np.stack([theirs_images[i % 3].numpy() for i in range(300)])
    theirs = theirs * np.reshape(loader.IMAGENET_STD, (3, 1, 1)) + np.reshape(loader.IMAGENET_MEAN, (3, 1, 1))
    np.testing.assert_allclose(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(ours.std(), theirs.std(), atol=0.02)


def test_counts_must_be_positive(photos: Path) -> None:
    with pytest.raises(ConfigError, match="--batches"):
        loader.run(arguments("--data", str(photos), "--batches", "0"))
