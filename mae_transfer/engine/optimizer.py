"""AdamW and LARS as the paper sets them up, and their schedule: linear warm-up, then half a cosine, per iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mae_transfer.errors import ConfigError

OPTIMIZERS = ("adamw", "lars")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule; the defaults are pretraining's (paper, Table 8)."""

    name: str = "adamw"  # or lars, the linear probe's
    base_lr: float = 1.5e-4  # for 256 images: lr = base_lr * global batch / 256
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    momentum: float = 0.9  # of LARS
    warmup_epochs: float = 40.0
    min_lr: float = 0.0
    layer_decay: float = 1.0  # the learning rate of each layer over that of the next one; 1 for the same everywhere
    clip_grad: float | None = None  # largest gradient norm; null for none, as in the paper

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"optim.name={self.name}; use one of {', '.join(OPTIMIZERS)}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.momentum={self.momentum} must be at least 0 and below 1")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay={self.layer_decay} must be above 0 and at most 1 (1 = none)")
        if self.base_lr <= 0:
            raise ConfigError(f"optim.base_lr={self.base_lr} must be positive")
        if self.weight_decay < 0:
            raise ConfigError(f"optim.weight_decay={self.weight_decay} must not be negative")
        if self.warmup_epochs < 0:
            raise ConfigError(f"optim.warmup_epochs={self.warmup_epochs} must not be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ConfigError(f"optim.clip_grad={self.clip_grad} must be positive; null turns clipping off")

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate after warm-up, by the linear scaling rule (paper, Table 8)."""
        return self.base_lr * batch_size / 256


def is_not_decayed(name: str, parameter: Tensor) -> bool:
    """One-dimensional parameters and biases (and nothing else) are free of weight decay (paper, Table 8)."""
    return parameter.ndim <= 1 or name.endswith(".bias")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameters that train, in two groups: decayed and not. ``names`` says which parameters a group holds."""
    decayed: dict[str, object] = {"params": [], "names": [], "weight_decay": weight_decay}
    free: dict[str, object] = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = free if is_not_decayed(name, parameter) else decayed
        group["params"].append(parameter)  # type: ignore[attr-defined]
        group["names"].append(name)  # type: ignore[attr-defined]
    return [group for group in (decayed, free) if group["params"]]


def build_optimizer(groups: Sequence[Mapping[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, on ``groups`` as ``decay_groups`` or ``layer_decay.parameter_groups`` give
    them. The learning rate is set anew before every step, times a group's ``lr_scale`` where it has one."""
    return build_lars(groups, config) if config.name == "lars" else build_adamw(groups, config)


def build_adamw(groups: Sequence[Mapping[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW on CPU and GPU alike."""
    trained = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(trained, lr=config.base_lr, betas=(config.betas[0], config.betas[1]), fused=True)


def build_lars(groups: Sequence[Mapping[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """LARS (You et al. 2017) as in the released linear probe: weights of two or more dimensions are scaled by the trust
    ratio whether they are decayed or not, others never."""
    from mae_transfer.engine.lars import Lars  # brings timm, which nothing else of the engine needs

    split = []
    for group in groups:
        for adapted in (True, False):
            params = [parameter for parameter in group["params"] if (parameter.ndim > 1) == adapted]
            if params:
                rest = {key: value for key, value in group.items() if key not in ("params", "names")}
                split.append({**rest, "params": params, "always_adapt": adapted})
    return Lars(split, lr=config.base_lr, momentum=config.momentum)


def warmup_cosine(*, peak: float, warmup_steps: int, num_steps: int, minimum: float = 0.0) -> Callable[[int], float]:
    """Learning rate of step t (0-based): t/warm-up of the peak, then half a cosine that would reach the minimum at
    step ``num_steps``.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    if warmup_steps > num_steps:
        raise ConfigError(
            f"the warm-up of {warmup_steps} steps is longer than the run of {num_steps}; lower optim.warmup_epochs"
        )

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate
