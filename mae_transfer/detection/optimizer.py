"""AdamW with layer-wise decay, and the schedules of the two recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler, ParamScheduler
from torch import Tensor, nn

from mae_transfer.detection.backbone import MAEBackbone
from mae_transfer.errors import ConfigError
from mae_transfer.layer_decay import NoDecay, no_decay_1d, parameter_groups

_RELATIVE_POSITION = re.compile(r"\.(rel_pos_[hw]|relative_position_bias_table)$")

DECAY_RULES = ("clean", "parity", "all")

# The norms that Detectron2's optimizer builder knows. Its own channel LayerNorm, used throughout ViTDet's neck and
# heads, is not among them, so the published models decay those norms.
_DETECTRON2_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm)


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    weight_decay: float = 0.1,
    betas: Sequence[float] = (0.9, 0.999),
    layer_decay: float = 1.0,
    decay_rule: str = "clean",
    lr_batch_size: int | None = None,
    batch_size: int | None = None,
) -> torch.optim.AdamW:
    """AdamW over a detector whose ``backbone`` is an ``MAEBackbone``.

    Args:
        lr: of the pyramid and the heads; the encoder's follows from ``layer_decay``. Frozen parameters are left out.
        lr_batch_size: the batch size that ``lr`` is meant for: it grows linearly with ``batch_size`` (Goyal et al.
            2017, as in Detectron2); None for the same ``lr`` whatever the batch.
        batch_size: images of a step, in all processes and accumulation rounds.
        layer_decay: factor from one layer to the one before it; 1 for none.
        decay_rule: which parameters are decayed. "clean": none that is one-dimensional (norms, biases), no
            position, absolute or relative. "parity": as ViTDet's B and L were trained: all but pos_embed and the norms
            that Detectron2 knows, hence also biases, relative positions and the norms of neck and heads. "all": every
            parameter, as ViTDet's H.

    Raises:
        ConfigError: a value that cannot be meant.
    """
    if lr <= 0 or weight_decay < 0:
        raise ConfigError(f"optimizer.lr={lr}, optimizer.weight_decay={weight_decay}: expected > 0 and >= 0")
    lr = scaled_lr(lr, batch_size=batch_size, lr_batch_size=lr_batch_size)
    assert isinstance(model.backbone, MAEBackbone)
    groups = parameter_groups(
        model,
        depth=model.backbone.net.depth,
        rate=layer_decay,
        lr=lr,
        weight_decay=weight_decay,
        no_decay=decay_predicate(decay_rule, model),
    )
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)


def scaled_lr(lr: float, *, batch_size: int | None, lr_batch_size: int | None) -> float:
    """``lr``, given for ``lr_batch_size`` images a step, for ``batch_size`` of them; see ``adamw``."""
    if lr_batch_size is None:
        return lr
    if lr_batch_size < 1 or batch_size is None:
        raise ConfigError(f"optimizer.lr_batch_size={lr_batch_size}: expected a batch size above 0, or null")
    return lr * batch_size / lr_batch_size


def decay_predicate(rule: str, model: nn.Module) -> NoDecay:
    """Which parameters a rule spares; see ``adamw``."""
    if rule == "clean":
        return lambda name, parameter: no_decay_1d(name, parameter) or bool(_RELATIVE_POSITION.search(name))
    if rule == "all":
        return lambda name, parameter: False
    if rule != "parity":
        raise ConfigError(f"optimizer.decay_rule={rule}: expected one of {', '.join(DECAY_RULES)}")
    # LayerNorm2d of our pyramid is a torch LayerNorm by class, Detectron2's is not: compare the exact class there.
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _DETECTRON2_NORMS) and type(module).__name__ != "LayerNorm2d"
        for parameter in module.parameters(recurse=False)
    }

    def no_decay(name: str, parameter: Tensor) -> bool:
        return id(parameter) in spared or name.endswith("pos_embed")

    return no_decay


def schedule(
    *,
    max_iter: int,
    kind: str = "steps",
    warmup_iters: int = 250,
    warmup_factor: float = 0.001,
    milestones: Sequence[float] = (8 / 9, 26 / 27),
) -> ParamScheduler:
    """The factor on the learning rate over a run of ``max_iter`` iterations.

    Args:
        kind: "steps" divides by ten at ``milestones`` (ViTDet); "cosine" is half a cosine to 0 (Li et al.).
        warmup_iters: linear, from ``warmup_factor``.
        milestones: as fractions of the run, so that they follow when it is shortened.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    from detectron2.solver import WarmupParamScheduler

    if warmup_iters >= max_iter:
        raise ConfigError(
            f"schedule.warmup_iters={warmup_iters} does not fit in train.max_iter={max_iter}; lower the first"
        )
    if kind == "steps":
        values = [0.1**drop for drop in range(len(milestones) + 1)]
        steps = [round(fraction * max_iter) for fraction in milestones]
        after: ParamScheduler = MultiStepParamScheduler(values=values, milestones=steps, num_updates=max_iter)
    elif kind == "cosine":
        after = CosineParamScheduler(1.0, 0.0)
    else:
        raise ConfigError(f"schedule.kind={kind}: expected steps or cosine")
    return WarmupParamScheduler(after, warmup_factor=warmup_factor, warmup_length=warmup_iters / max_iter)
