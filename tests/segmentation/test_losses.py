"""Losses by name against float64 written out: our Dice, and weights and hard pixels in MMSegmentation's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from torch import Tensor, nn

from mae_transfer.errors import ConfigError
from mae_transfer.segmentation import recipe
from mae_transfer.segmentation.config import load_config
from mae_transfer.segmentation.losses import MAEDiceLoss, balanced_weights
from mae_transfer.segmentation.recipe import Facts
from mae_transfer.segmentation.settings import read_settings
from mae_transfer.segmentation.train import describe_weights

CONFIG = str(Path(__file__).resolve().parents[2] / "configs/segmentation/upernet_tiny.py")
IGNORE = 255


def case(num_images: int = 3, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and labels with ignored pixels; the last class occurs nowhere, the last image has no label at all."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, num_classes, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes - 1, (num_images, 6, 5), generator=generator)
    labels[:, :2] = IGNORE
    labels[-1] = IGNORE
    return logits, labels


def dice(logits: np.ndarray, labels: np.ndarray, eps: float = 1.0) -> float:
    """The formula of the docstring, pixel by pixel and class by class."""
    losses = []
    for image, truth in zip(logits, labels, strict=True):
        pixels = [(image[:, y, x], truth[y, x]) for y in range(truth.shape[0]) for x in range(truth.shape[1])]
        pixels = [(np.exp(scores) / np.exp(scores).sum(), label) for scores, label in pixels if label != IGNORE]
        of_image = []
        for index in sorted({label for _, label in pixels}):
            overlap = sum(p[index] for p, label in pixels if label == index)
            squares = sum(p[index] ** 2 for p, _ in pixels) + sum(1 for _, label in pixels if label == index)
            of_image.append(1 - (2 * overlap + eps) / (squares + eps))
        losses.append(sum(of_image) / len(of_image) if of_image else 0.0)
    return sum(losses) / len(losses)


def test_dice_is_the_formula() -> None:
    logits, labels = case()
    assert float(MAEDiceLoss()(logits, labels)) == pytest.approx(dice(logits.numpy(), labels.numpy()), rel=1e-5)
    assert float(MAEDiceLoss(loss_weight=0.4)(logits, labels)) == pytest.approx(
        0.4 * dice(logits.numpy(), labels.numpy()), rel=1e-5
    )


def test_dice_of_the_truth_is_zero() -> None:
    _, labels = case()
    certain = 50 * F.one_hot(labels.where(labels != IGNORE, 0), 4).permute(0, 3, 1, 2).double()
    assert float(MAEDiceLoss()(certain, labels)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("ours", "blind"), [(True, True), (False, False)])
def test_ignored_pixels_have_no_part_in_dice(ours: bool, blind: bool) -> None:
    """The trap: MMSegmentation's own trains towards "no class" where nothing is labelled."""
    logits, labels = case()
    logits.requires_grad_()
    loss = MAEDiceLoss() if ours else MODELS.build({"type": "mmseg.DiceLoss", "use_sigmoid": False})
    loss(logits, labels, ignore_index=IGNORE).backward()
    assert (logits.grad[:, :, :2].abs().max() == 0) == blind


def test_parts_of_a_batch_average_to_its_loss() -> None:
    """What accumulation and several processes rely on: equal parts, whatever is ignored in each."""
    logits, labels = case(num_images=4)
    for name in ("cross_entropy", "dice"):
        (loss,) = build({"loss": name})
        whole = loss(logits, labels, ignore_index=IGNORE)
        parts = [loss(logits[i::2], labels[i::2], ignore_index=IGNORE) for i in range(2)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


def facts(**changes: Any) -> Facts:
    values = {"size": "tiny", "patch_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "classes": tuple("abcd")}
    return Facts(**{**values, **changes})


def head_config(head: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = read_settings({"dataset": {"crop_size": 64}, "head": {"channels": 16, **head}})
    return recipe.model(settings, facts(**changes))["decode_head"]


def build(head: dict[str, Any], **changes: Any) -> list[nn.Module]:
    losses = head_config(head, **changes)["loss_decode"]
    with DefaultScope.overwrite_default_scope("mmseg"):
        return [MODELS.build(loss) for loss in (losses if isinstance(losses, list) else [losses])]


def test_class_weights_are_torchs() -> None:
    """MMSegmentation's weighted mean over labelled pixels, as torch's own in float64."""
    logits, labels = case()
    for head, weights in (
        ({"class_weights": (1.0, 2.0, 0.5, 4.0)}, (1.0, 2.0, 0.5, 4.0)),
        ({"class_weights": "balanced"}, (0.5, 3.0, 1.0, 9.0)),
    ):
        (loss,) = build(head, class_weights=(0.5, 3.0, 1.0, 9.0))
        expected = F.cross_entropy(logits, labels, weight=torch.tensor(weights).double(), ignore_index=IGNORE)
        torch.testing.assert_close(loss(logits, labels, ignore_index=IGNORE), expected, atol=1e-6, rtol=1e-6)


def test_balanced_weights_are_enets() -> None:
    counts = [900, 90, 10, 0]
    raw = [1 / math.log(1.02 + count / 1000) for count in counts]
    mean = sum(weight * count for weight, count in zip(raw, counts, strict=True)) / 1000
    assert balanced_weights(counts) == pytest.approx([weight / mean for weight in raw])
    weights = balanced_weights([10**9, 1])
    assert weights[1] / weights[0] < 36, "bounded, however rare a class is"
    assert balanced_weights([0, 0]) == (1.0, 1.0)


def test_balanced_weights_are_counted_in_the_training_masks(make_folder) -> None:
    folder = make_folder(num_train=3)
    options = {"dataset.root": str(folder), "dataset.reduce_zero_label": False, "head.class_weights": "balanced"}
    masks = [np.asarray(Image.open(path)) for path in (folder / "annotations/training").iterdir()]
    expected = balanced_weights(np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=4))
    config = load_config(CONFIG, options, work_dir="run")
    for head in (config.model.decode_head, config.model.auxiliary_head):
        assert head.loss_decode.class_weight == pytest.approx(expected)
    (line,) = describe_weights(config)
    assert f"blue {expected[3]:.3g}" in line
    # What tests a run needs no weights, and reads no masks for them.
    assert load_config(CONFIG, options, work_dir="run", for_training=False).facts.class_weights is None


def test_hard_pixels_and_summed_losses_in_the_head() -> None:
    """Cross entropy of pixels given less than 0.6, over all pixels; Dice of all of them beside it."""
    config = head_config({"loss": ("cross_entropy", "dice"), "ohem": True, "ohem_threshold": 0.6, "ohem_min_kept": 2})
    with DefaultScope.overwrite_default_scope("mmseg"):
        head = MODELS.build(config)
    logits, labels = case()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
    losses = head.loss_by_feat(2 * logits, samples)
    right = (2 * logits).softmax(1).gather(1, labels.where(labels != IGNORE, 0)[:, None])[:, 0]
    hard = (right < 0.6) & (labels != IGNORE)
    assert 0 < hard.sum() < (labels != IGNORE).sum()
    by_pixel = F.cross_entropy(2 * logits, labels, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses["loss_ce"], (by_pixel * hard).mean())
    assert float(losses["loss_dice"]) == pytest.approx(dice(2 * logits.numpy(), labels.numpy()), rel=1e-5)


def test_a_fifth_of_the_crop_is_kept_in_any_case() -> None:
    assert head_config({"ohem": True})["sampler"]["min_kept"] == 64 * 64 // 5
    assert head_config({})["sampler"] is None


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"loss": "focus"}, "cross_entropy, dice"),
        ({"loss": ("dice", "dice")}, "each once"),
        ({"loss": "dice", "ohem": True}, "are for cross entropy"),
        ({"class_weights": "even"}, "none, balanced, or a number for each class"),
        ({"class_weights": (1.0, 2.0)}, "2 numbers for 4 classes"),
        ({"class_weights": (1.0, -2.0, 1.0, 1.0)}, "none below 0"),
        ({"ohem": True, "ohem_threshold": 1.5}, "probability"),
    ],
)
def test_what_cannot_be_meant_is_refused(head: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head_config(head)
