"""Layer decay, LARS, schedule and loss of classification, each against an independent computation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Lars as TimmLars
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from mae_transfer.classification.augment import drawing_from
from mae_transfer.classification.config import FINETUNE_OPTIM, LINEAR_OPTIM
from mae_transfer.classification.images import LabelledBatch
from mae_transfer.classification.model import Classifier
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.engine.lars import Lars
from mae_transfer.engine.optimizer import build_lars, build_optimizer, decay_groups, warmup_cosine
from mae_transfer.layer_decay import parameter_groups


@pytest.mark.parametrize("rate", [0.65, 0.75])
def test_layer_decay_is_timms_for_vit_base(rate: float) -> None:
    """Same learning rate and weight decay for every parameter. timm is told that the model's ``no_weight_decay`` names
    (pos_embed, cls_token) are not decayed, as the released fine-tuning code does; left alone it decays them."""
    with torch.device("meta"):
        ours = Classifier(num_classes=1000)
        theirs = timm.create_model("vit_base_patch16_224", global_pool="avg", fc_norm=True)
    spared = theirs.no_weight_decay()
    groups = param_groups_layer_decay(theirs, weight_decay=0.05, layer_decay=rate, no_weight_decay_list=spared)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    expected = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    got = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(ours, depth=12, rate=rate, lr=1.0, weight_decay=0.05)
        for name in group["names"]
    }
    assert got.keys() == expected.keys()
    for name, (scale, decay) in expected.items():
        assert got[name] == (pytest.approx(scale, rel=1e-12), decay), name


def test_layer_decay_is_the_released_rule() -> None:
    """util/lr_decay.py of the released code, written out: embeddings 0, block i i + 1, the rest depth + 1; 1-D
    parameters, pos_embed and cls_token not decayed."""
    with torch.device("meta"):
        model = Classifier(num_classes=10, width=32, depth=3, num_heads=2)
    for group in parameter_groups(model, depth=3, rate=0.5, lr=2.0, weight_decay=0.05):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
                layer = 0
            else:
                layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 4
            assert group["lr_scale"] == 0.5 ** (4 - layer) and group["lr"] == 2 * 0.5 ** (4 - layer), name
            spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (0 if spared else 0.05), name


def gradients(step: int, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def head(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 5, dtype=dtype)


def step_lars(optimizer: Any, model: nn.Linear, step: int, rate: float, *, scale: float = 1.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    own = list(model.parameters())
    for parameter, gradient in zip(own, gradients(step, [p.shape for p in own], own[0].dtype), strict=True):
        parameter.grad = gradient * scale
    optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_timms_step_by_step(decay: float) -> None:
    ours, theirs = head(), head()
    optimizer = build_optimizer(decay_groups(ours, decay), LINEAR_OPTIM)
    groups = [
        {"params": [theirs.weight], "weight_decay": decay, "always_adapt": True},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    reference = TimmLars(groups, lr=0.1, momentum=0.9)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]  # as the trainer sets it: nothing to leave out
    for step in range(6):
        for trained, model in ((optimizer, ours), (reference, theirs)):
            step_lars(trained, model, step, rate=0.1 * step)
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias), step
    assert not torch.equal(ours.weight, head().weight)


def test_lars_is_the_released_rule_in_float64() -> None:
    """util/lars.py of the released code, written out: the trust ratio for weights also where they are not decayed."""
    model = head(torch.float64)
    optimizer = build_lars(decay_groups(model, 0.0), LINEAR_OPTIM)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(1, 5):
        step_lars(optimizer, model, step, rate=0.3)
        d_weight, d_bias = gradients(step, [weight.shape, bias.shape], torch.float64)
        moments[0] = 0.9 * moments[0] + d_weight * 0.001 * weight.norm() / d_weight.norm()
        moments[1] = 0.9 * moments[1] + d_bias
        weight, bias = weight - 0.3 * moments[0], bias - 0.3 * moments[1]
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-8, atol=1e-10)  # timm adds 1e-8 to the norm
        torch.testing.assert_close(model.bias.detach(), bias, rtol=1e-12, atol=1e-14)


def test_lars_leaves_out_steps_that_are_not_finite() -> None:
    model, plain = head(), head()
    optimizer = build_lars(decay_groups(model, 0.0), LINEAR_OPTIM)
    reference = build_lars(decay_groups(plain, 0.0), LINEAR_OPTIM)
    assert isinstance(optimizer, Lars)
    for step, bad in enumerate([True, False, False, True, False]):
        optimizer.found_inf = torch.tensor(float(bad))
        step_lars(optimizer, model, step, rate=0.3, scale=math.nan if bad else 1.0)
        if not bad:
            step_lars(reference, plain, step, rate=0.3)
        assert torch.equal(model.weight, plain.weight) and torch.equal(model.bias, plain.bias), step


def test_schedule_is_timms_and_the_released_one() -> None:
    """Per iteration, warm-up from 0. The released code computes with fractions of an epoch: the same where the warm-up
    is a whole number of steps, to which ours is rounded."""
    epoch, warmup, epochs, peak, minimum = 10, 2, 8, 2e-3, FINETUNE_OPTIM.min_lr
    rate = warmup_cosine(peak=peak, warmup_steps=warmup * epoch, num_steps=epochs * epoch, minimum=minimum)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = CosineLRScheduler(
        optimizer, t_initial=(epochs - warmup) * epoch, lr_min=minimum, warmup_t=warmup * epoch, warmup_lr_init=0,
        warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    for step in range(epochs * epoch):
        theirs.step_update(step)
        now = step / epoch
        released = peak * now / warmup
        if now >= warmup:
            turn = math.cos(math.pi * (now - warmup) / (epochs - warmup))
            released = minimum + (peak - minimum) * 0.5 * (1 + turn)
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        assert rate(step) == pytest.approx(released, rel=1e-9), step


class Fixed(nn.Module):
    """Logits that are a fixed linear function of the pixels, in float64."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = torch.randn(3 * 16 * 16, num_classes, dtype=torch.float64) * 0.1

    def forward(self, images: Tensor) -> Tensor:
        return images.double().flatten(1) @ self.weight


@pytest.mark.parametrize("mixed", [True, False])
def test_loss_of_a_batch_is_timms(mixed: bool, run: ClassificationRun) -> None:
    """Mixup or cutmix with SoftTargetCrossEntropy, or LabelSmoothingCrossEntropy where nothing is mixed, in float64."""
    changes = {"erase": 0.0} if mixed else {"erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    run.config = replace(run.config, augment=replace(run.config.augment, **changes))
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (8, 16, 16, 3), np.uint8)).permute(0, 3, 1, 2)
    labels = torch.arange(8) % len(run.classes)
    kinds = set()
    for word in range(6):
        batch = LabelledBatch(images=pixels, labels=labels, word=word)
        model = Fixed(len(run.classes))
        ours = run.loss(model, batch)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (run.mean, run.std))
        images = (pixels.float() / 255 - mean) / std
        if mixed:
            mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=len(run.classes))
            with drawing_from(word):
                images, targets = mixup(images, labels)
            kept = images[0] == (pixels[0].float() / 255 - mean) / std  # cutmix leaves pixels as they are
            kinds.add(bool(kept.float().mean() > 0.05))
            expected = SoftTargetCrossEntropy()(model(images), targets.double())
        else:
            expected = LabelSmoothingCrossEntropy(0.1)(model(images), labels)
        assert float(ours) == pytest.approx(float(expected), rel=1e-6)
    assert not mixed or kinds == {True, False}, "both of mixup and cutmix were drawn"
