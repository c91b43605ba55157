"""What goes into a training step: batches from keys, broken files among them, several crops of one image."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as oracle

from mae_transfer.data.batches import UnreadableCount, batch_stream, fixed_images, open_images, to_batch
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.sampler import SampleKey, StepSampler
from mae_transfer.data.transforms import centre_crop, draw_crop, normalise
from mae_transfer.errors import ConfigError, RunFailed
from pretrain.cli import main
from pretrain.config import DataConfig
from pretrain.images import MaskedBatch, MaskedImages, fixed_batch
from pretrain.masking import build_sampler
from tests.data.test_decode import BROKEN
from tests.data.test_shards import write_shard
from tests.pictures import picture, write_pictures
from tests.pretrain.small import ARGUMENTS, timeless

TINY = str(Path(__file__).resolve().parents[2] / "configs" / "pretrain" / "tiny.yaml")
SAMPLER = build_sampler("random", (4, 4), 0.75)


def images_at(path: Path, **options: Any) -> MaskedImages:
    data = DataConfig(path=str(path), image_size=32, scan_cache=False, **options)
    return MaskedImages(open_images(data, data.roots), data=data, sampler=SAMPLER, seed=5)


def write_jpegs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        picture(seed, (90, 120)).save(folder / f"{seed:03d}.jpg", quality=95)
    return folder


def stream(dataset: MaskedImages, *, workers: int = 0, **options: Any) -> list[MaskedBatch]:
    sampler = StepSampler(num_samples=len(dataset), seed=5, stop_step=4, **{"batch_size": 4, **options})
    count = UnreadableCount(num_samples=len(dataset), limit=1.0)
    return list(batch_stream(dataset, sampler, workers=workers, pin_memory=False, count=count))


def test_a_batch_is_what_its_keys_say(tmp_path: Path) -> None:
    """The whole way against torchvision on Pillow images, with the crop parameters of the keys."""
    dataset = images_at(write_jpegs(tmp_path, 3))
    keys = [SampleKey(0, 2), SampleKey(1, 0), SampleKey(7, 2)]
    batch = dataset.__getitems__(keys)
    assert batch.images.shape == (3, 3, 32, 32) and batch.images.dtype == torch.uint8 and not batch.unreadable
    for made, noise, key in zip(batch.images, batch.noise, keys, strict=True):
        address = {"seed": 5, "epoch": key.epoch, "index": key.index}
        crop = draw_crop(Draws(purpose=Purpose.CROP, **address), image_size=(90, 120))
        with Image.open(tmp_path / f"{key.index:03d}.jpg") as image:
            box = (crop.top, crop.left, crop.height, crop.width)
            expected = oracle.resized_crop(image, *box, [32, 32], interpolation=InterpolationMode.BICUBIC)
        expected = np.asarray(oracle.hflip(expected) if crop.flip else expected).astype(int)
        gap = np.abs(made.permute(1, 2, 0).numpy() - expected)
        assert gap.max() <= 16 and gap.mean() < 0.3
        own = SAMPLER.noise(Draws(purpose=Purpose.MASK, **address).generator())
        np.testing.assert_array_equal(noise.numpy(), own)


def test_several_crops_of_one_image_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = images_at(write_jpegs(tmp_path, 4), repeats=3)
    opened: list[int] = []
    original = dataset.source.picture
    monkeypatch.setattr(dataset.source, "picture", lambda index: opened.append(index) or original(index))
    keys = StepSampler(num_samples=4, batch_size=6, seed=5, stop_step=1, repeats=3).global_batch(0)
    batch = dataset.__getitems__(keys)
    assert opened == [keys[0].index, keys[3].index]
    # The first view is that of a run without repeats; the others differ, in crop and in mask.
    first = dataset.__getitems__([SampleKey(key.epoch, key.index) for key in keys[::3]])
    torch.testing.assert_close(batch.images[::3], first.images, rtol=0, atol=0)
    torch.testing.assert_close(batch.noise[::3], first.noise, rtol=0, atol=0)
    for i in range(6):
        for j in range(i):
            assert not torch.equal(batch.images[i], batch.images[j])
            assert not torch.equal(batch.noise[i], batch.noise[j])
    # Alone, each view is what it is in company.
    for i, key in enumerate(keys):
        torch.testing.assert_close(dataset.__getitems__([key]).images[0], batch.images[i], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_workers_and_caches_change_no_pixel(tmp_path: Path, kind: str) -> None:
    folder = write_jpegs(tmp_path / "images", 5)
    if kind == "shards":
        write_shard(tmp_path / "shards" / "0.tar", {path.name: path.read_bytes() for path in sorted(folder.iterdir())})
        folder = tmp_path / "shards"
    plain = stream(images_at(folder))
    for other in (stream(images_at(folder), workers=2), stream(images_at(folder, cache="ram"))):
        for a, b in zip(plain, other, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.noise, b.noise)


def broken_folder(folder: Path, *, whole: int) -> Path:
    """``whole`` photos, and one file of each kind that is broken."""
    write_jpegs(folder, whole)
    for number, make in enumerate(BROKEN.values()):
        (folder / f"broken-{number:02d}.jpg").write_bytes(make())
    return folder


def test_broken_files_are_replaced_the_same_way_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = broken_folder(tmp_path, whole=20)
    dataset = images_at(folder)
    options = {"batch_size": 12, "num_samples": len(dataset), "seed": 5, "stop_step": 4}
    count = UnreadableCount(num_samples=len(dataset), limit=1.0)
    alone = list(batch_stream(dataset, StepSampler(**options), workers=0, pin_memory=False, count=count))
    assert count.seen == set(range(20, 20 + len(BROKEN)))  # the names sort behind the photos'
    for number in range(len(BROKEN)):
        assert caplog.text.count(f"broken-{number:02d}.jpg") == 1  # named, and once
    total = 20 + len(BROKEN)
    assert count.summary() == (
        f"{len(BROKEN)} of {total} images ({len(BROKEN) / total:.1%}) could not be read and were replaced by others"
    )
    # Two processes with two workers each: the same batches; together they have seen what one sees alone.
    counts = [UnreadableCount(num_samples=total, limit=1.0) for _ in range(2)]
    for rank, own in enumerate(counts):
        share = StepSampler(**options, rank=rank, world_size=2)
        for whole, part in zip(
            alone, batch_stream(images_at(folder), share, workers=2, pin_memory=False, count=own), strict=True
        ):
            assert torch.equal(whole.images[rank * 6 : rank * 6 + 6], part.images)
    assert counts[0].seen != count.seen
    caplog.clear()
    counts[0].merge(counts[1].seen)
    assert counts[0].seen == count.seen and counts[0].summary() == count.summary() and not caplog.text


def test_too_many_broken_files_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    count = UnreadableCount(num_samples=100, limit=0.02)
    count.add({3: "cannot read a.jpg", 4: "cannot read b.jpg"})
    count.add({3: "cannot read a.jpg"})
    assert count.summary().startswith("2 of 100 images (2.0%)")
    with pytest.raises(RunFailed, match=r"3 of 100 images cannot be read.*data\.max_unreadable=0\.02"):
        count.add({5: "cannot read c.jpg"})
    other = UnreadableCount(num_samples=100, limit=0.02)
    assert "all of the 100 images" in other.summary()
    other.merge({1, 2}, [7])
    with pytest.raises(RunFailed, match="3 of 100"):
        other.check()


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(RunFailed, match=r"images in a row cannot be read.*a\.jpg"):
        images_at(tmp_path).__getitems__([SampleKey(0, 0)])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("workers", [0, 2])
def test_measured_data_keep_their_type_to_the_device(tmp_path: Path, dtype: type, workers: int) -> None:
    whole = {np.uint8: 255, np.uint16: 65535}.get(dtype, 1)
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.full((40, 50, 6), [i / 10 * whole for i in range(6)]).astype(dtype))
    dataset = images_at(tmp_path, channels=6, mean=[0.25] * 6, std=[0.5] * 6)
    batch = stream(dataset, workers=workers)[0]
    assert batch.images.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype and batch.images.shape == (4, 6, 32, 32)
    expected = (torch.arange(6) / 10 - 0.25) / 0.5
    values = normalise(batch.images, [0.25] * 6, [0.5] * 6)
    torch.testing.assert_close(values, expected.view(1, 6, 1, 1).expand_as(values), atol=0.01, rtol=0)


def test_types_may_be_mixed_in_a_batch(tmp_path: Path) -> None:
    for number, (dtype, whole) in enumerate(((np.uint8, 255), (np.uint16, 65535), (np.float32, 1.0), (np.uint8, 255))):
        np.save(tmp_path / f"{number}.npy", np.full((40, 50, 2), 0.6 * whole).astype(dtype))
    dataset = images_at(tmp_path, channels=2, mean=[0.0] * 2, std=[1.0] * 2)
    images = dataset.__getitems__([SampleKey(0, index) for index in range(4)]).images
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.full_like(images, 0.6), atol=2e-5, rtol=0)


def test_measured_data_need_a_mean_and_deviation_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"data\.channels=6 .*data\.mean=\[…\] and data\.std=\[…\] with 6 values"):
        DataConfig(channels=6)
    with pytest.raises(ConfigError, match=r"data\.mean has 3 values; data\.channels=6 needs as many"):
        DataConfig(channels=6, mean=[0.5] * 3, std=[0.5] * 6)
    assert DataConfig(channels=6, mean=[0.1] * 6, std=[0.2] * 6).normalisation == ([0.1] * 6, [0.2] * 6)


def test_config_of_repeats_and_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"data\.repeats=0"):
        DataConfig(repeats=0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().scan_cache_folder == tmp_path / "mae-transfer"
    assert DataConfig(scan_cache=str(tmp_path / "x")).scan_cache_folder == tmp_path / "x"
    assert DataConfig(scan_cache=False).scan_cache_folder is None


def test_fixed_images_are_centred_and_named_when_replaced(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    (tmp_path / "003.png").write_bytes(b"text")
    data = DataConfig(path=str(tmp_path), image_size=32, scan_cache=False)
    source = open_images(data, data.roots)
    images, unreadable = fixed_images(source, indices=[2, 0, 3], size=(32, 32), seed=0)
    assert list(unreadable) == [3]
    for made, seed in zip(images, (2, 0), strict=False):
        np.testing.assert_array_equal(made.permute(1, 2, 0).numpy(), centre_crop(picture(seed), size=(32, 32)))
    batch = fixed_batch(source, indices=[2, 0, 3], size=(32, 32), sampler=SAMPLER, seed=0)
    assert torch.equal(batch.images, images) and batch.unreadable == unreadable and batch.noise.shape == (3, 16)


def test_a_batch_of_gray_and_coloured_images() -> None:
    gray, colour = np.full((4, 5, 1), 7, np.uint8), np.full((4, 5, 3), 9, np.uint8)
    batch = to_batch([gray, colour])
    assert batch.shape == (2, 3, 4, 5) and (batch[0] == 7).all() and (batch[1] == 9).all()


def test_a_jpeg_that_ends_too_early_is_unreadable_however_little_of_it_is_needed(tmp_path: Path) -> None:
    """The crop may lie above the place where the file was cut off: the file is broken all the same."""
    file = io.BytesIO()
    picture(0, (200, 200)).save(file, "JPEG")
    write_jpegs(tmp_path, 1)
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:-300])
    for epoch in range(5):
        assert list(images_at(tmp_path).__getitems__([SampleKey(epoch, 1)]).unreadable) == [1]


def test_measured_data_train_from_start_to_pictures(tmp_path: Path) -> None:
    for number in range(6):
        values = np.random.default_rng(number).random((40, 50, 5)) * 65535
        np.save(tmp_path / f"{number}.npy", values.astype(np.uint16))
    own = ("data.channels=5", "data.mean=[.5,.5,.5,.5,.5]", "data.std=[.3,.3,.3,.3,.3]", "data.repeats=2")
    length = ("train.steps=2", "train.batch_size=4", "optim.warmup_epochs=0", "log.reconstruct_every_epochs=1")
    folder = tmp_path / "run"
    assert main([TINY, *ARGUMENTS, *own, *length, f"data.path={tmp_path}", f"run.dir={folder}"]) == 0
    assert len(timeless(folder / "metrics.jsonl")) == 2
    (picture_file, *_) = (folder / "reconstructions").glob("*.png")
    with Image.open(picture_file) as shown:
        assert shown.mode == "RGB"


def test_broken_files_are_counted_at_the_end_of_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = broken_folder(tmp_path / "data", whole=30)
    length = ("train.epochs=1", "optim.warmup_epochs=0", "data.max_unreadable=0.5")
    assert main([TINY, *ARGUMENTS, *length, f"data.path={folder}", f"run.dir={tmp_path / 'run'}"]) == 0
    assert f"{len(BROKEN)} of {30 + len(BROKEN)} images" in caplog.text
