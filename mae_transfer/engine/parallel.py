"""A model spread over processes by PyTorch's own engines, DDP or FSDP2, and compiled block by block before that.

Order matters: a block recomputes its own activations (``vit.Block``), compilation goes around the block, sharding
around both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mae_transfer.engine.distribution import Processes
from mae_transfer.errors import ConfigError

STRATEGIES = ("ddp", "fsdp2")


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's ``ModuleList``s: its transformer blocks."""
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block by itself, in place: a minute instead of many, and the names of the weights stay."""
    for block in repeated_blocks(model):
        block.compile()


def parallelise(model: nn.Module, processes: Processes, *, strategy: str) -> nn.Module:
    """The module to call in training. Build the optimiser afterwards: FSDP2 replaces the parameters by shards.

    Both keep parameters, gradients and their exchange in float32 and leave the arithmetic to autocast, so they train
    alike. Under FSDP2 each block is gathered when it is its turn and given up afterwards; the root holds the rest.

    Raises:
        ConfigError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"train.distributed={strategy}; use one of {', '.join(STRATEGIES)}")
    if not processes.is_distributed:
        return model
    if strategy == "fsdp2":
        shard(model, repeated_blocks(model), device=processes.device, world_size=processes.world_size)
        return model
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    # Buckets as views of the gradients save a copy; the loss uses every parameter, so none has to be searched for.
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def shard(model: nn.Module, blocks: Iterable[nn.Module], *, device: torch.device, world_size: int) -> None:
    """Spread ``model`` over all processes by FSDP2, in place: each of ``blocks`` by itself, the rest together."""
    mesh = init_device_mesh(device.type, (world_size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def gradient_exchange(module: nn.Module, *, last: bool) -> Iterator[None]:
    """The context of an accumulation round: gradients are exchanged in the last one only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def is_sharded(module: nn.Module) -> bool:
    """Whether a forward pass of ``module`` needs all processes."""
    return isinstance(module, FSDPModule)
