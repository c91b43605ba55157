"""One process or several (torchrun): device, rank, data-parallel wrapping, agreement between processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_transfer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over processes; itself when there is one."""
        if not self.is_distributed:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Buckets as views of the gradients save a copy; the loss uses every parameter, so none has to be searched for.
        return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over processes, in place."""
        if self.is_distributed:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process. All of them must call this at the same place."""
        if not self.is_distributed:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()


def no_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """The context of an accumulation round: gradients are exchanged in the last one only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside data-parallel and compile wrappers."""
    if isinstance(module, DistributedDataParallel):
        return unwrap(module.module)
    compiled = getattr(module, "_orig_mod", None)
    return unwrap(compiled) if isinstance(compiled, nn.Module) else module


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the process group that torchrun describes in the environment, or run alone.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"train.device={device}; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, and torch sees no GPU; use train.device=cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
    else:
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(device=chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(device=chosen, rank=dist.get_rank(), local_rank=local_rank, world_size=world_size)
    finally:
        dist.destroy_process_group()
