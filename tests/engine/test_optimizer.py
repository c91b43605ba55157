from __future__ import annotations

import math

import pytest
import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from mae_transfer.engine.optimizer import OptimConfig, build_adamw, decay_groups, warmup_cosine
from mae_transfer.errors import ConfigError
from pretrain import build_mae


def test_groups_are_timms() -> None:
    model = build_mae(size="tiny", image_size=32, patch_size=8, depth=2, decoder_depth=1)
    ours = {float(group["weight_decay"]): {id(p) for p in group["params"]} for group in decay_groups(model, 0.05)}
    theirs = {
        group["weight_decay"]: {id(p) for p in group["params"]} for group in param_groups_weight_decay(model, 0.05)
    }
    assert ours == theirs


def test_group_names_follow_the_papers_rule() -> None:
    model = build_mae(size="tiny", image_size=32, patch_size=8, depth=1, decoder_depth=1)
    decayed, free = decay_groups(model, 0.05)
    assert all(name.endswith("weight") or "token" in name for name in decayed["names"])
    assert all(name.endswith("bias") or "norm" in name for name in free["names"])
    assert "pos_embed" not in decayed["names"] + free["names"], "fixed tables are not trained"


def test_schedule_is_timms() -> None:
    steps, warmup, peak = 50, 7, 2e-3
    rate = warmup_cosine(peak=peak, warmup_steps=warmup, num_steps=steps, minimum=1e-5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = CosineLRScheduler(
        optimizer, t_initial=steps - warmup, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=0, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
    for step in range(steps):
        theirs.step_update(step)
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_schedule_by_formula() -> None:
    rate = warmup_cosine(peak=1.0, warmup_steps=10, num_steps=110)
    assert [rate(step) for step in (0, 5, 10)] == [0, 0.5, 1]
    assert rate(60) == pytest.approx(0.5)
    assert rate(109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 99 / 100)))
    assert rate(110) == pytest.approx(0, abs=1e-12)


def test_linear_scaling_and_the_papers_defaults() -> None:
    config = OptimConfig()
    assert config.peak_lr(4096) == pytest.approx(2.4e-3)
    assert (config.weight_decay, config.betas, config.warmup_epochs) == (0.05, [0.9, 0.95], 40)


def test_warm_up_longer_than_the_run() -> None:
    with pytest.raises(ConfigError, match=r"warm-up of 11 steps is longer than the run of 10"):
        warmup_cosine(peak=1.0, warmup_steps=11, num_steps=10)


def test_fused_adamw_is_adamw_by_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    model = nn.Module()
    model.weight = weight
    optimizer = build_adamw(decay_groups(model, 0.1), OptimConfig(base_lr=0.01))
    gradient = torch.tensor([[0.5, -3.0]], dtype=torch.float64)
    expected, m, v = weight.detach().clone(), torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    for step in (1, 2, 3):
        weight.grad = gradient * step
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient * step, 0.95 * v + 0.05 * (gradient * step) ** 2
        expected = expected * (1 - 0.01 * 0.1)
        expected = expected - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)
