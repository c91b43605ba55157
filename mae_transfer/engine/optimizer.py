"""AdamW as the paper sets it up, and its schedule: linear warm-up, then half a cosine, per iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from mae_transfer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule (paper, Table 8)."""

    base_lr: float = 1.5e-4  # for 256 images: lr = base_lr * global batch / 256
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup_epochs: float = 40.0
    min_lr: float = 0.0
    clip_grad: float | None = None  # largest gradient norm; null for none, as in the paper

    def __post_init__(self) -> None:
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


def is_not_decayed(name: str, parameter: nn.Parameter) -> bool:
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


def build_adamw(groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW on CPU and GPU alike; the learning rate is set anew before every step."""
    trained = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(trained, lr=config.base_lr, betas=(config.betas[0], config.betas[1]), fused=True)


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
