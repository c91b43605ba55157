"""Layer-wise learning-rate decay and mixed precision on MMEngine's registries."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_transfer.errors import ConfigError, unknown_key
from mae_transfer.layer_decay import parameter_groups

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_GROUPS = ("clean", "parity")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MAELayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups by name: lr · rate^(depth + 1 − layer), for any model whose ``backbone`` is our encoder.

    Options, in ``paramwise_cfg``:

    * ``decay_rate``: of the learning rate from one layer to the one before it.
    * ``weight_decay_groups``: "clean" (the default) keeps weight decay off every bias, norm, layer scale, position
      embedding, cls token and relative-position table; "parity" follows BEiT's and MMSegmentation's code, which mean
      the same but name the parameters wrongly, so that embeddings and tables *are* decayed.

    Raises:
        ConfigError: an unknown option, or a model without an encoder of ours.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append the groups of ``module``'s trainable parameters to ``params``."""
        options = dict(self.paramwise_cfg)
        for key in options:
            if key not in ("decay_rate", "weight_decay_groups"):
                raise unknown_key(
                    f"paramwise_cfg.{key}", ("paramwise_cfg.decay_rate", "paramwise_cfg.weight_decay_groups")
                )
        kind = options.get("weight_decay_groups", "clean")
        if kind not in _GROUPS:
            raise ConfigError(f"weight_decay_groups is {kind!r}; expected one of {', '.join(_GROUPS)}")
        depth = _encoder_depth(module)
        groups = parameter_groups(
            ((plain_name(name), param) for name, param in module.named_parameters() if param.requires_grad),
            depth=depth,
            rate=options["decay_rate"],
            lr=self.base_lr,
            weight_decay=self.base_wd,
            no_decay=undecayed_as_published if kind == "parity" else undecayed,
        )
        for group in groups:
            # MMEngine's schedulers and logs know the names under this key.
            params.append(
                {**{key: value for key, value in group.items() if key != "names"}, "param_names": group["names"]}
            )
        print_log(
            f"layer decay {options['decay_rate']} over {depth + 2} layers: {len(groups)} parameter groups, "
            f"learning rates {min(group['lr'] for group in groups):.3g} to {max(group['lr'] for group in groups):.3g}, "
            f"weight decay groups: {kind}",
            logger="current",
        )


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, torch.compile and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def undecayed(name: str, parameter: Tensor) -> bool:
    """Biases, norms, layer scales, embeddings, tokens and relative-position tables carry no weight decay."""
    if parameter.ndim == 1 or name.endswith(".bias"):
        return True
    leaf = name.rsplit(".", 1)[-1]
    return leaf in ("pos_embed", "cls_token", "relative_position_bias_table", "rel_pos_h", "rel_pos_w")


def undecayed_as_published(name: str, parameter: Tensor) -> bool:
    """BEiT's and MMSegmentation's rule as it runs: only one-dimensional parameters and biases are spared."""
    return parameter.ndim == 1 or name.endswith(".bias")


def _encoder_depth(module: nn.Module) -> int:
    """Depth of the encoder, through whatever wraps the backbone."""
    backbone = getattr(module, "backbone", None)
    while backbone is not None and not hasattr(backbone, "depth"):
        backbone = next((getattr(backbone, name) for name in _WRAPPERS if hasattr(backbone, name)), None)
    if backbone is None:
        raise ConfigError(
            f"MAELayerDecayConstructor needs a model whose backbone is MAEViT; {type(module).__name__} has none"
        )
    return int(backbone.depth)


@OPTIM_WRAPPERS.register_module()
class MAEOptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper where an iteration is an optimizer step, whatever ``accumulative_counts``.

    MMEngine counts micro-batches as iterations, so that with accumulation every number of iterations (length,
    schedule, warm-up, intervals) has to be multiplied by hand; a schedule that was not ends half-way at a rate of 0.
    ``MAETrainLoop`` runs all micro-batches of a step in one iteration instead. Sharded gradients can be clipped too.
    """

    @property
    def accumulate(self) -> int:
        """Micro-batches to a step."""
        return self._accumulative_counts

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Called by MMEngine's Runner with iterations; counted inside are micro-batches."""
        super().initialize_count_status(model, init_counts * self.accumulate, max_counts * self.accumulate)

    def _clip_grad(self) -> None:
        options = dict(self.clip_grad_kwargs)
        if "max_norm" not in options:  # by value
            super()._clip_grad()
            return
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        limit, kind = options.pop("max_norm"), options.pop("norm_type", 2.0)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], kind, **options)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # the shards' norms put together, by all processes
        clip_grads_with_norm_(parameters, limit, norm)
        self.message_hub.update_scalar("train/grad_norm", float(norm))


@OPTIM_WRAPPERS.register_module()
class MAEAmpOptimWrapper(MAEOptimWrapper, AmpOptimWrapper):
    """MMEngine's AmpOptimWrapper that also runs in bfloat16 on CPUs, where it needs no loss scaler.

    MMEngine's own refuses to be built without a GPU, and scales losses in bfloat16 too, whose range makes it needless.

    Args:
        dtype: "bfloat16", or "float16" with a dynamic loss scale that is saved with the optimizer.
        **kwargs: OptimWrapper's.
    """

    def __init__(self, dtype: str = "bfloat16", **kwargs: Any) -> None:
        if dtype not in ("bfloat16", "float16"):
            raise ConfigError(f"MAEAmpOptimWrapper: dtype is {dtype!r}; expected bfloat16 or float16")
        OptimWrapper.__init__(self, **kwargs)  # past AmpOptimWrapper's own, which asserts a GPU
        self.cast_dtype = getattr(torch, dtype)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler(get_device().split(":")[0], enabled=dtype == "float16")
