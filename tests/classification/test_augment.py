"""Augmentation against timm's own objects, with the same random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.random_erasing
import torch
from PIL import Image, ImageOps
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from mae_transfer.classification.augment import (
    Recolour,
    _operations,
    check_micro_batch,
    draw_erased,
    drawing_from,
    finish_batch,
)
from mae_transfer.classification.images import LabelledBatch
from mae_transfer.classification.sections import AUGMENTATIONS
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.transforms import normalise
from mae_transfer.errors import ConfigError, DataError
from tests.pictures import picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_global_generators_draw_from_the_word_and_are_put_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    undisturbed = [drawn() for _ in range(2)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = drawn()
    with drawing_from(2**64 - 1):
        inside = drawn()
    assert [before, drawn()] == undisturbed
    with drawing_from(2**64 - 1):
        assert drawn() == inside
    with drawing_from(7):
        assert drawn() != inside


@pytest.mark.parametrize("auto", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "augmix-m5-w4-d2"])
def test_policies_are_those_of_timms_training_transform(auto: str) -> None:
    """The published code's own call; its crop and flip come before, its erasing after what is compared."""
    theirs: Compose = create_transform(
        (48, 48), is_training=True, color_jitter=None, auto_augment=auto, interpolation="bicubic", mean=MEAN, std=STD
    )
    policy = theirs.transforms[2]
    ours = Recolour(auto, 0.0, size=(48, 48), mean=MEAN)
    changed = 0
    for word in range(20):
        image = picture(word, (48, 48))
        with drawing_from(word):
            expected = np.array(policy(image))
        got = ours(torch.from_numpy(np.array(image)), word).numpy()
        assert np.array_equal(got, expected)
        changed += not np.array_equal(got, np.array(image))
    assert changed > 10


def test_a_posterized_picture_may_keep_no_bit() -> None:
    """At magnitude 10 timm asks Pillow to keep 0 bits, which Pillow 13 refuses."""
    image = torch.from_numpy(np.array(picture(0, (32, 32))))
    strongest = Recolour("rand-m10-mstd0-inc1-n15-p1", 0.0, size=(32, 32), mean=MEAN)
    assert any(strongest(image, word).max() == 0 for word in range(20))
    for number, operation in enumerate(_operations(strongest._transform)):
        if operation.name.startswith("Posterize"):
            bits = operation.level_fn(9, operation.hparams)[0]
            expected = ImageOps.posterize(picture(number, (8, 8)), bits)
            assert np.array_equal(operation.aug_fn(picture(number, (8, 8)), bits), expected)
            break
    else:
        pytest.fail("no such operation")


def test_colour_jitter_is_torchvisions_and_works_beside_a_policy_and_on_gray_pictures() -> None:
    image = torch.from_numpy(np.array(picture(0, (32, 32))))
    jitter = create_transform((32, 32), is_training=True, color_jitter=0.4, auto_augment=None).transforms[2]
    with drawing_from(3):
        expected = np.array(jitter(Image.fromarray(image.numpy())))
    assert np.array_equal(Recolour(None, 0.4, size=(32, 32), mean=MEAN)(image, 3).numpy(), expected)
    auto = "rand-m9-mstd0.5-inc1"
    both, alone = (Recolour(auto, jitter, size=(32, 32), mean=MEAN) for jitter in (0.4, 0.0))
    assert not torch.equal(both(image, 3), alone(image, 3))
    gray = Recolour(auto, 0.4, size=(32, 32), mean=(0.45,))
    assert gray(image[:, :, :1], 5).shape == (32, 32, 1)
    assert alone(image[:, :, :1], 5).shape == (32, 32, 3)  # a gray file among coloured ones


def test_what_cannot_be_recoloured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"augment\.auto=rondaugment-m9 is no policy"):
        Recolour("rondaugment-m9", 0.0, size=(32, 32), mean=MEAN)
    with pytest.raises(ConfigError, match=r"data\.channels=5; set augment\.auto=none"):
        Recolour("rand-m9", 0.0, size=(32, 32), mean=(0.5,) * 5)
    with pytest.raises(DataError, match="8-bit pictures"):
        Recolour("rand-m9", 0.0, size=(32, 32), mean=MEAN)(torch.zeros(32, 32, 3), 0)
    values = torch.zeros(32, 32, 5)
    assert Recolour(None, 0.0, size=(32, 32), mean=(0.5,) * 5)(values, 0) is values


class Sequence:
    """Stands for the module ``random`` in timm: hands out given uniform numbers."""

    def __init__(self, values: Iterator[float]) -> None:
        self.values = values

    def random(self) -> float:
        return next(self.values)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.values)

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self.values) * (high - low + 1))


@pytest.mark.parametrize("size", [(32, 32), (24, 60)])
def test_erased_boxes_are_timms(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    eraser = timm.data.random_erasing.RandomErasing(0.6, mode="const", device="cpu")
    erased = 0
    for index in range(200):
        draws = Draws(seed=1, purpose=Purpose.ERASE, index=index)
        values = Draws(seed=1, purpose=Purpose.ERASE, index=index).uniform(41).tolist()
        # An attempt that fails draws two numbers there and four here: skip the place that it did not use.
        monkeypatch.setattr(timm.data.random_erasing, "random", Sequence(_as_used(values, size)))
        theirs = torch.ones(3, *size)
        eraser(theirs)
        ours = torch.ones(3, *size)
        drawn = draw_erased(draws, probability=0.6, mode="const", size=size, channels=3)
        if drawn is not None:
            box, _ = drawn
            ours[:, box.top : box.top + box.height, box.left : box.left + box.width] = 0
            erased += 1
        assert torch.equal(ours, theirs)
    assert 90 < erased < 150


def _as_used(values: list[float], size: tuple[int, int]) -> Iterator[float]:
    yield values[0]
    for attempt in range(10):
        area, aspect, top, left = values[1 + 4 * attempt : 5 + 4 * attempt]
        yield area
        yield aspect
        pixels = (0.02 + (1 / 3 - 0.02) * area) * size[0] * size[1]
        ratio = np.exp(np.log(0.3) + (np.log(1 / 0.3) - np.log(0.3)) * aspect)
        if round(np.sqrt(pixels / ratio)) < size[1] and round(np.sqrt(pixels * ratio)) < size[0]:
            yield top
            yield left


@pytest.mark.parametrize(("mode", "spread"), [("pixel", 1.0), ("rand", 0.0), ("const", 0.0)])
def test_erased_values(mode: str, spread: float) -> None:
    draws = [Draws(seed=0, purpose=Purpose.ERASE, index=index) for index in range(50)]
    drawn = [draw_erased(d, probability=1.0, mode=mode, size=(64, 64), channels=3) for d in draws]
    values = [values for _, values in filter(None, drawn)]
    assert len(values) == 50
    assert np.mean([value.std(axis=(1, 2)) for value in values]) == pytest.approx(spread, abs=0.05)
    assert (max(np.abs(value).max() for value in values) == 0) == (mode == "const")
    assert draw_erased(draws[0], probability=0.0, mode=mode, size=(64, 64), channels=3) is None


def batch(count: int = 6, *, word: int = 11) -> LabelledBatch:
    images = np.stack([np.array(picture(i, (24, 24))) for i in range(count)])
    labels = torch.arange(count) % 5
    return LabelledBatch(images=torch.from_numpy(images).permute(0, 3, 1, 2), labels=labels, word=word)


@pytest.mark.parametrize(
    ("mixup", "cutmix", "prob"), [(0.8, 1.0, 1.0), (0.8, 0.0, 1.0), (0.0, 1.0, 1.0), (0.8, 1.0, 0.5)]
)
def test_mixed_batches_are_timms(mixup: float, cutmix: float, prob: float) -> None:
    config = replace(AUGMENTATIONS["recipe"], mixup=mixup, cutmix=cutmix, mixup_prob=prob)
    theirs = Mixup(mixup, cutmix, prob=prob, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=5)
    for word in range(12):
        given = batch(word=word)
        images, targets = finish_batch(given, config=config, mean=MEAN, std=STD, num_classes=5)
        np.random.seed([word, 0])  # noqa: NPY002 - what timm draws from
        expected = theirs(normalise(batch().images, MEAN, STD), batch().labels)
        torch.testing.assert_close((images, targets), expected, rtol=0, atol=0)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_without_mixing_labels_stay_numbers_and_boxes_are_erased_after_normalisation() -> None:
    given = batch()
    box, values = draw_erased(  # type: ignore[misc]
        Draws(seed=0, purpose=Purpose.ERASE), probability=1.0, mode="pixel", size=(24, 24), channels=3
    )
    given.erased, given.noise = [(2, box), (4, box)], torch.from_numpy(np.concatenate([values.ravel()] * 2))
    images, targets = finish_batch(given, config=AUGMENTATIONS["crop"], mean=MEAN, std=STD, num_classes=5)
    expected = normalise(batch().images, MEAN, STD)
    for place in (2, 4):
        expected[place, :, box.top : box.top + box.height, box.left : box.left + box.width] = torch.from_numpy(values)
    assert torch.equal(images, expected) and torch.equal(targets, batch().labels)


def test_an_image_without_partner_is_refused() -> None:
    check_micro_batch(AUGMENTATIONS["recipe"], 8)
    check_micro_batch(AUGMENTATIONS["crop"], 7)
    with pytest.raises(ConfigError, match="a micro-batch has 7; make"):
        check_micro_batch(AUGMENTATIONS["recipe"], 7)


def test_features_pass_through() -> None:
    given = SimpleNamespace(images=torch.rand(4, 8), labels=torch.arange(4))
    images, labels = finish_batch(given, config=AUGMENTATIONS["crop"], mean=MEAN, std=STD, num_classes=4)  # type: ignore[arg-type]
    assert images is given.images and labels is given.labels
