"""Several processes: DistributedDataParallel that runs on CPUs too, and parameters in shards (FSDP2).

Whichever it is, a checkpoint holds whole tensors under the names of the plain model, so that any number of processes
goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS  # the root: MMEngine looks for wrappers there alone
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


@MODEL_WRAPPERS.register_module()
class MAEDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's wrapper; its Runner names a GPU for it even where there is none, which DDP refuses.

    Args:
        module: on the device it is trained on.
        **_: ``device_ids`` as MMEngine passes it.
    """

    def __init__(self, module: nn.Module, **_: Any) -> None:
        device = next(module.parameters()).device
        super().__init__(
            module=module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,  # running means are put together where they are used: ``share_statistics``
            gradient_as_bucket_view=True,
        )


@contextmanager
def joined(launcher: str) -> Iterator[None]:
    """Leave the group of processes at the end; where there are no GPUs, join torchrun's at the beginning.

    With GPUs MMEngine joins; its own way of it begins by choosing one.
    """
    if launcher == "pytorch" and not torch.cuda.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model``'s parameters are spread over processes."""
    return isinstance(model, FSDPModule)


def share_statistics(model: nn.Module) -> None:
    """Replace each process's running means and variances by their mean over processes; all call this together.

    They are running averages, hence linear: putting them together more often, as where a run is interrupted, changes
    nothing of what they are later.
    """
    if get_world_size() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.numel():
            all_reduce(buffer, op="mean")


def whole(state: Any) -> Any:
    """``state`` with its tensors whole and on the CPU of the main process, empty elsewhere; all call this together."""

    def put_together(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.detach().cpu() if is_main_process() else torch.empty(0)

    return apply_to(state, lambda value: isinstance(value, Tensor), put_together)


def share_of(tensor: Tensor, own: Tensor) -> Tensor:
    """The part of a whole ``tensor`` that this process has of ``own``; ``tensor`` itself where nothing is sharded."""
    if not isinstance(own, DTensor):
        return tensor
    tensor = tensor.to(device=own.device, dtype=own.dtype)
    # Every process has read the whole file: each cuts its part out, none sends any.
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def optimizer_shares(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state dict with this process's part of every moment."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        index: {
            name: share_of(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in moments.items()
        }
        for index, moments in state["state"].items()
    }
    return {**state, "state": shares}


def gather(model: nn.Module) -> None:
    """Put a sharded model's parameters together, so that each process may run it as often as its images ask for.

    All processes call this together; a model that is not sharded is left as it is.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_reshard_after_forward(False)
    for module in _sharded(model):
        module.unshard()


def release(model: nn.Module) -> None:
    """Undo ``gather``."""
    if not isinstance(model, FSDPModule):
        return
    for module in _sharded(model):
        module.reshard()
        # The root holds what is needed in every pass: gathered once for forward and backward, as FSDP2 does by default.
        module.set_reshard_after_forward(module is not model, recurse=False)


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
