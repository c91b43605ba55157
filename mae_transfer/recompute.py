"""On a CPU, what the backward pass computes again rather than keeps: normalised tokens and GELU's output.

Computing these again costs about what reading them back from memory would; keeping them is a third of all that a
Vision Transformer keeps. Attention does the same with its softmax (``attention.SelfAttendOnCPU``). Together a ViT-B
step in bf16 keeps 30 MB an image instead of 55, at the same speed.

Results are those of the layers as written, in their dtypes: the functions here decide only what is kept. Where the
layers are not plain ones (hooks, subclasses, parametrisations), under compilation and on GPUs, they are called as they
are. Nothing outlives a forward and its backward pass, so optimisers, sharding and gradient hooks see nothing new.

Shapes: N batch, T tokens, D width, H width of the layer that follows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ON_CPU = True  # False calls the layers as they are; for measuring and tests


def applies(x: Tensor) -> bool:
    """Whether something is to be recomputed for a backward pass through ``x`` at all."""
    return ON_CPU and x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def norm_linear(x: Tensor, norm: nn.Module, linear: nn.Linear) -> Tensor:
    """linear(norm(x)), (N, T, D) -> (N, T, H); of all this, x alone is kept."""
    if not (applies(x) and _is_plain(norm, nn.LayerNorm) and _is_plain(linear, nn.Linear)):
        return linear(norm(x))
    assert isinstance(norm, nn.LayerNorm)
    dtype = _dtype(x)
    return NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, dtype)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gelu(x)), (N, T, D) -> (N, T, H); of all this, x alone is kept."""
    if not (applies(x) and _is_plain(linear, nn.Linear)):
        return linear(F.gelu(x))
    return GeluLinear.apply(x, linear.weight, linear.bias, _dtype(x))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` would do nothing but what its class says."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooked and isinstance(module.weight, Tensor)


def _dtype(x: Tensor) -> torch.dtype:
    """In which a linear layer computes on ``x``, as autocast has it (float64 is left alone)."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


class NormLinear(torch.autograd.Function):
    """linear(layer_norm(x))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        normalised, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        cast = weight.to(dtype)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, cast)
        ctx.eps = eps
        return F.linear(normalised.to(dtype), cast, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        needs_x, needs_norm, needs_norm_bias, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_norm = grad_norm_bias = grad_weight = grad_bias = None
        if needs_weight:
            normalised = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps)[0]
            grad_weight = _rows(grad).t() @ _rows(normalised.to(weight.dtype))  # (H, D)
            del normalised
        if needs_bias:
            grad_bias = _rows(grad).sum(0)
        if needs_x or needs_norm or needs_norm_bias:
            grad_normalised = (grad @ weight).to(x.dtype)  # (N, T, D)
            grad_x, grad_norm, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
                grad_normalised,
                x,
                x.shape[-1:],
                mean,
                rstd,
                norm_weight,
                norm_bias,
                [needs_x, needs_norm, needs_norm_bias],
            )
        return grad_x, grad_norm, grad_norm_bias, None, grad_weight, grad_bias, None


class GeluLinear(torch.autograd.Function):
    """linear(gelu(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        cast = weight.to(dtype)
        ctx.save_for_backward(x, cast)
        return F.linear(F.gelu(x).to(dtype), cast, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = _rows(grad).t() @ _rows(F.gelu(x).to(weight.dtype))  # (H, D)
        if needs_bias:
            grad_bias = _rows(grad).sum(0)
        if needs_x:
            grad_x = torch.ops.aten.gelu_backward((grad @ weight).to(x.dtype), x)
        return grad_x, grad_weight, grad_bias, None


def _rows(x: Tensor) -> Tensor:
    """(N, T, D) -> (N·T, D)."""
    return x.reshape(-1, x.shape[-1])
