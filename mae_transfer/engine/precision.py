"""fp32, bf16 or fp16: autocast, and the gradient scaling that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from mae_transfer.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16")


class Precision:
    """How the forward pass computes, on which device.

    Parameters, optimiser state and the loss stay fp32 in all three. bf16 has fp32's range and needs no scaling; fp16
    does, and is offered on GPUs only: a CPU has no fast fp16 arithmetic, so it would be slower and less safe.

    Raises:
        ConfigError: an unknown name, or fp16 without a GPU.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in PRECISIONS:
            raise ConfigError(f"train.precision={name}; use one of {', '.join(PRECISIONS)}")
        if name == "fp16" and device.type != "cuda":
            raise ConfigError(f"train.precision=fp16 needs a GPU and this run is on {device.type}; use bf16")
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        if self.name == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)
