"""On a CPU, what the backward pass computes again rather than keeps: normalised tokens and GELU's output.

Computing these again costs about what reading them back from memory would; keeping them is a third of all that a
Vision Transformer keeps. Attention does the same with its softmax (``attention.SelfAttendOnCPU``). Together a ViT-B
step in bf16 keeps 30 MB an image instead of 55, and takes about 1 % longer.

Results are those of the layers as written, in their dtypes: the functions here decide only what is kept. Where the
layers are not plain ones (hooks, subclasses, parametrisations) or narrow, under compilation and on GPUs, they are
called as they are. Weights are kept as they are too, rather than their copies in bf16. Nothing outlives a forward and
its backward pass, so optimisers, sharding and gradient hooks see nothing new.

Shapes: N batch, T tokens, D width, H width of the layer that follows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ON_CPU = True  # False calls the layers as they are; for measuring and tests
# The narrower the layers, the more their elementwise work is beside their products, and the less there is to save:
# recomputing costs 1 % of a step at width 768 and 6 % at 192.
MIN_WIDTH = 384
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def applies(x: Tensor, width: int) -> bool:
    """Whether a block of ``width`` is to recompute anything for a backward pass through ``x``."""
    return runs_on_cpu(x) and width >= MIN_WIDTH and torch.is_grad_enabled()


def runs_on_cpu(x: Tensor) -> bool:
    """Whether functions written for CPUs may take ``x``: not while a compiler or an exporter reads the operators."""
    return (
        ON_CPU
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def norm_linear(x: Tensor, norm: nn.Module, linear: nn.Linear) -> Tensor:
    """linear(norm(x)), (N, T, D) -> (N, T, H); of all this, x alone is kept."""
    if not (applies(x, x.shape[-1]) and _is_plain(norm, nn.LayerNorm) and _is_plain(linear, nn.Linear)):
        return linear(norm(x))
    assert isinstance(norm, nn.LayerNorm)
    dtype = _dtype(x)
    return NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, dtype)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gelu(x)), (N, T, D) -> (N, T, H); of all this, x alone is kept."""
    if not (applies(x, linear.out_features) and _is_plain(linear, nn.Linear)):
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
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        ctx.eps, ctx.dtype = eps, dtype
        return product(normalised.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        needs_x, needs_norm, needs_norm_bias, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_norm = grad_norm_bias = grad_weight = grad_bias = None
        if needs_weight:
            normalised = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps)[0]
            grad_weight = _rows(grad).t() @ _rows(normalised.to(ctx.dtype))  # (H, D)
            del normalised
        if needs_bias:
            grad_bias = _rows(grad).sum(0)
        if needs_x or needs_norm or needs_norm_bias:
            grad_normalised = product(grad, weight.to(ctx.dtype).t()).to(x.dtype)  # (N, T, D)
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
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return product(F.gelu(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = _rows(grad).t() @ _rows(F.gelu(x).to(ctx.dtype))  # (H, D)
        if needs_bias:
            grad_bias = _rows(grad).sum(0)
        if needs_x:
            grad_x = product(grad, weight.to(ctx.dtype).t()).to(x.dtype)
            torch.ops.aten.gelu_backward.grad_input(grad_x, x, grad_input=grad_x)  # in place
        return grad_x, grad_weight, grad_bias, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias, (…, D) and (H, D) -> (…, H): in float32 by oneDNN.

    On an AMD processor such a product is 10 % faster than by the BLAS that torch takes for float32, a step of ViT-B at
    512 px 2 to 3 %. In bfloat16 torch takes oneDNN by itself, and torch.compile always does on CPUs.
    """
    if x.dtype != torch.float32 or not _HAS_ONEDNN:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _rows(x: Tensor) -> Tensor:
    """(N, T, D) -> (N·T, D)."""
    return x.reshape(-1, x.shape[-1])
