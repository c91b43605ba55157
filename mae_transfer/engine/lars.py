"""LARS, timm's, that leaves out steps which are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from torch import Tensor


class Lars(timm.optim.Lars):
    """As ``timm.optim.Lars``. Where ``found_inf`` (set by the trainer before each step) is 1, parameters and momentum
    stay as they are, without asking the device: torch's fused AdamW does the same."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.found_inf is None:
            return super().step(closure)
        skip = self.found_inf.bool()
        before = [
            (parameter, parameter.clone(), self._momentum(parameter, clone=True))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        result = super().step(closure)
        for parameter, old, momentum in before:
            torch.where(skip, old, parameter, out=parameter)
            new = self._momentum(parameter)
            if new is not None:  # the first step makes it: nothing yet is the same as zero
                torch.where(skip, torch.zeros_like(new) if momentum is None else momentum, new, out=new)
        return result

    def _momentum(self, parameter: Tensor, *, clone: bool = False) -> Tensor | None:
        buffer = self.state[parameter].get("momentum_buffer")
        return buffer.clone() if clone and buffer is not None else buffer
