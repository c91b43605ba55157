"""Labelled batches: functions of their keys, with the labels of what was read; evaluation sees every image once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.images import EvaluationImages, LabelledBatch, LabelledImages, evaluation_batches
from mae_transfer.classification.sections import AugmentSection, DataConfig, ModelConfig
from mae_transfer.classification.views import evaluation_view
from mae_transfer.data.find import open_source
from mae_transfer.data.sampler import SampleKey
from mae_transfer.data.source import Source
from mae_transfer.engine.distribution import Processes
from tests.pictures import picture


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Nine pictures in three classes, one of them gray, one damaged (number 4)."""
    root = tmp_path_factory.mktemp("classes")
    for number in range(9):
        folder = root / f"class-{number // 3}"
        folder.mkdir(exist_ok=True)
        image = picture(number, (40, 48)).convert("L" if number == 1 else "RGB")
        image.save(folder / f"{number}.png")
    damaged = root / "class-1" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    return open_source([root])


def config(**augment: object) -> ClassificationConfig:
    return ClassificationConfig(
        data=DataConfig(image_size=32, train="unused", val="unused"),
        model=ModelConfig(size="tiny", patch_size=8),
        augment=AugmentSection(**augment),  # type: ignore[arg-type]
    ).filled(None)


def labelled(source: Source, *, seed: int = 0, **augment: object) -> LabelledImages:
    assert source.labels is not None
    return LabelledImages(source, source.labels, config=config(**augment), seed=seed)


def assert_equal(a: LabelledBatch, b: LabelledBatch, *, rows: slice = slice(None)) -> None:
    assert torch.equal(a.images[rows], b.images) and torch.equal(a.labels[rows], b.labels)


KEYS = [SampleKey(0, 0), SampleKey(0, 1), SampleKey(0, 8, 0), SampleKey(0, 8, 1), SampleKey(1, 2), SampleKey(1, 7)]


def test_samples_do_not_depend_on_their_neighbours_nor_on_any_state(source: Source) -> None:
    data = labelled(source, erase=1.0)
    whole = data.__getitems__(KEYS)
    assert whole.images.shape == (6, 3, 32, 32) and whole.images.dtype == torch.uint8
    assert whole.labels.tolist() == [0, 0, 2, 2, 0, 2]
    np.random.seed(5)  # noqa: NPY002 - the state that nothing may depend on
    torch.manual_seed(5)
    again = labelled(source, erase=1.0).__getitems__(KEYS)
    assert_equal(again, whole)
    assert torch.equal(again.noise, whole.noise) and again.erased == whole.erased and again.word == whole.word
    second = data.__getitems__(KEYS[2:])
    assert_equal(whole, second, rows=slice(2, None))
    assert [(place + 2, box) for place, box in second.erased] == whole.erased[2:]
    assert torch.equal(second.noise, whole.noise[-len(second.noise) :])
    # Views, epochs and seeds are different draws.
    assert not torch.equal(whole.images[2], whole.images[3])
    other = data.__getitems__([SampleKey(3, 0)])
    assert not torch.equal(other.images[0], whole.images[0])
    assert not torch.equal(labelled(source, seed=1).__getitems__(KEYS).images, whole.images)


def test_a_replacement_brings_its_own_label(source: Source) -> None:
    data = labelled(source)
    labels = set()
    for epoch in range(12):
        batch = data.__getitems__([SampleKey(epoch, 4)])
        assert list(batch.unreadable) == [4] and "4.png" in batch.unreadable[4]
        labels.add(int(batch.labels[0]))
    assert labels == {0, 1, 2}  # with its own they would all be of class 1


def test_kinds_of_augmentation(source: Source) -> None:
    view = evaluation_view(source.picture(0), size=(32, 32), crop=224 / 256)
    plain = labelled(source, kind="none").__getitems__(KEYS)
    assert torch.equal(plain.images[0].permute(1, 2, 0), view) and not plain.erased
    flips = [labelled(source, kind="crop", flip=flip).__getitems__(KEYS).images for flip in (0.0, 1.0)]
    assert torch.equal(flips[0], flips[1].flip(3))
    assert not torch.equal(flips[0], plain.images)
    recoloured = labelled(source, flip=0.0, erase=0.0).__getitems__(KEYS).images
    same = labelled(source, flip=0.0, erase=0.0, auto="none").__getitems__(KEYS).images
    assert torch.equal(same, flips[0]) and not torch.equal(recoloured, same)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (3, 0)])
def test_evaluation_sees_every_image_once_and_replaces_none(source: Source, world_size: int, workers: int) -> None:
    images = EvaluationImages(source, size=(32, 32), crop=224 / 256)
    seen: dict[int, torch.Tensor] = {}
    rounds = set()
    for rank in range(world_size):
        processes = Processes(device=torch.device("cpu"), rank=rank, world_size=world_size)
        batches = list(evaluation_batches(images, processes, workers=workers))
        rounds.add(len(batches))
        for batch in batches:
            for row, index in enumerate(batch.indices if batch.counts else ()):
                assert index not in seen and bool(batch.readable[row]) == (index != 4)
                seen[index] = batch.images[row]
    assert sorted(seen) == list(range(9)) and len(rounds) == 1
    for index, pixels in seen.items():
        expected = torch.zeros(1) if index == 4 else images.__getitems__(range(index, index + 1)).images[0]
        assert torch.equal(pixels, expected.expand_as(pixels))


def test_a_folder_of_one_kind_of_measured_data(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"c{number % 2}").mkdir(exist_ok=True)
        np.save(tmp_path / f"c{number % 2}" / f"{number}.npy", np.full((40, 40, 5), number, np.float32))
    source = open_source([tmp_path], channels=5)
    batch = EvaluationImages(source, size=(32, 32), crop=1.0).__getitems__(range(4))
    assert batch.images.dtype == torch.float32 and batch.images.shape == (4, 5, 32, 32)
    assert batch.images.mean(dim=(1, 2, 3)).tolist() == [0, 2, 1, 3]
