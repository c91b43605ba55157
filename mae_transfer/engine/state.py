"""Everything that training changes, as named tensors: what a checkpoint holds, whole or in shards.

Names are ``model.<parameter>``, ``optimizer.state.<parameter>.<moment>`` and ``ema.<parameter>``. They do not depend
on how the model is spread over processes, so a state saved by eight is read by one, and the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from mae_transfer.engine.ema import WeightAverage
from mae_transfer.errors import CheckpointError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None
) -> dict[str, Tensor]:
    """References to the tensors themselves, sharded where the model is."""
    result = {f"model.{name}": tensor for name, tensor in _tensors(get_model_state_dict(model)).items()}
    moments = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    result |= {f"optimizer.{name}": tensor for name, tensor in _tensors(moments).items()}
    if average is not None:
        result |= {f"ema.{name}": tensor for name, tensor in average.tensors.items()}
    return result


def set_training_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what ``training_tensors`` gave. Hyper-parameters of the optimiser stay those of today's config."""
    set_model_state_dict(model, dict(_section(tensors, "model.")))
    moments: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_FLAT))
    set_optimizer_state_dict(model, optimizer, {**moments, **_section(tensors, "optimizer.")}, options=_FLAT)
    if average is not None:
        average.load(_section(tensors, "ema."))


def shard_like(whole: Mapping[str, Tensor], template: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Whole tensors as ``template`` has them: this process's part where a tensor is sharded.

    Raises:
        CheckpointError: names or shapes differ.
    """
    missing, unexpected = sorted(set(template) - set(whole)), sorted(set(whole) - set(template))
    if missing or unexpected:
        raise CheckpointError(
            f"{source} does not fit this model and optimiser: it lacks {missing[:4]} and has {unexpected[:4]} besides"
        )
    result = {}
    for name, own in template.items():
        if whole[name].shape != own.shape:
            raise CheckpointError(f"{source}: {name} has shape {tuple(whole[name].shape)}, expected {tuple(own.shape)}")
        tensor = whole[name].to(device=own.device, dtype=own.dtype)
        if isinstance(own, DTensor):
            # Every process has read the whole file: each cuts its part out, none sends any.
            tensor = distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
        result[name] = tensor
    return result


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights on the CPU, on the main process (elsewhere empty). All processes call this together."""
    return _tensors(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
