"""Attention for the one encoder: global, and in windows; plain, or with relative position.

The plain path (``Attention`` without relative position) is all that pretraining runs. Windows and relative position
exist for transfer: decomposed tables (MViTv2, ViTDet Section 3) and bias tables (BEiT, Li et al. 2021).

Shapes: N batch, T tokens, D width, M heads, d = D / M, (h, w) patch grid, s window side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mae_transfer.errors import ConfigError
from mae_transfer.position import Grid, ResizeCache, resize_bias_table, resize_decomposed, rotary_2d
from mae_transfer.recompute import applies, norm_linear, runs_on_cpu
from mae_transfer.relative import AttendInPieces, Bias, DecomposedBias, TabledBias

RELATIVE_KINDS = (None, "decomposed", "bias")

# On CPUs the fused call is slow for short sequences, and in bf16 its backward is slow up to longer ones: batched matrix
# products win up to about these lengths (forward + backward, one core of an AVX512-bf16 machine: 5 times at 17 to 65
# tokens in bf16, 2.7 times at 197, equal at 1024; in fp32 1.1 times at 65, half as fast at 512).
_CPU_MATMUL_TOKENS_HALF = 512
_CPU_MATMUL_TOKENS_FLOAT = 96
# As many images at a time as keep their scores within this: between the product, the softmax and the next product they
# then stay in the processor's cache.
_CPU_SCORE_BYTES = 2 << 20


def suits_matmul(q: Tensor) -> bool:
    """Whether plain matrix products beat the fused call for queries (…, T, d) on their device."""
    longest = _CPU_MATMUL_TOKENS_HALF if q.dtype in (torch.bfloat16, torch.float16) else _CPU_MATMUL_TOKENS_FLOAT
    return q.device.type == "cpu" and q.shape[-2] <= longest


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d + bias)·v, by the implementation that suits the device and the length.

    Args:
        q, k, v: (N, M, T, d).
        bias: added to the scores before the softmax; anything that broadcasts to (N, M, T, T).

    Returns:
        (N, M, T, d).
    """
    # A bias that needs a gradient sends the CPU's fused call down its slowest path, at any length.
    bias_is_trained = bias is not None and bias.requires_grad and q.device.type == "cpu"
    if not (bias_is_trained or suits_matmul(q)):
        if bias is not None:
            bias = bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, M, T, T)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(dim=-1).to(v.dtype) @ v


class SelfAttendOnCPU(torch.autograd.Function):
    """softmax(q·kᵀ/√d)·v of one packed tensor, (N, T, 3D) -> (N, T, D): ``attend`` for a CPU in training.

    The same products as by autograd, a few images at a time, reading heads from the packed tensor and writing their
    gradients into one; the scores are scaled inside the product. The packed tensor alone is kept: no copies of q, k
    and v, and no (N, M, T, T), which the backward pass computes again.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        n, t, packed = qkv.shape
        m, d = num_heads, packed // 3 // num_heads
        out = qkv.new_empty(n, t, m, d)
        heads = qkv.view(n, t, 3, m, d).permute(2, 0, 3, 1, 4)  # (3, N, M, T, d)
        step = _images_at_a_time(qkv, m)
        for start in range(0, n, step):
            stop = min(start + step, n)
            q, k, v = heads[:, start:stop].contiguous().view(3, -1, t, d)  # each (n·M, T, d)
            out[start:stop] = torch.bmm(_probabilities(q, k), v).view(-1, m, t, d).transpose(1, 2)
        ctx.save_for_backward(qkv)
        ctx.num_heads = num_heads
        return out.view(n, t, m * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        n, t, packed = qkv.shape
        m, d = ctx.num_heads, packed // 3 // ctx.num_heads
        grad_qkv = torch.empty_like(qkv)
        heads = qkv.view(n, t, 3, m, d).permute(2, 0, 3, 1, 4)  # (3, N, M, T, d)
        grad_heads = grad_qkv.view(n, t, 3, m, d).permute(2, 0, 3, 1, 4)
        grad = grad.reshape(n, t, m, d).transpose(1, 2)  # (N, M, T, d)
        step = _images_at_a_time(qkv, m)
        for start in range(0, n, step):
            stop = min(start + step, n)
            q, k, v = heads[:, start:stop].contiguous().view(3, -1, t, d)
            g = grad[start:stop].contiguous().view(-1, t, d)
            p = _probabilities(q, k)
            grad_q, grad_k, grad_v = pieces = qkv.new_empty(3, *q.shape)
            torch.bmm(p.transpose(1, 2), g, out=grad_v)
            grad_scores = torch.bmm(g, v.transpose(1, 2))
            torch._softmax_backward_data(grad_scores, p, -1, p.dtype, grad_input=grad_scores)
            _scaled_product(grad_scores, k, d**-0.5, out=grad_q)
            _scaled_product(grad_scores.transpose(1, 2), q, d**-0.5, out=grad_k)
            grad_heads[:, start:stop] = pieces.view(3, -1, m, t, d)
        return grad_qkv, None


def _images_at_a_time(qkv: Tensor, num_heads: int) -> int:
    return max(1, _CPU_SCORE_BYTES // (num_heads * qkv.shape[1] ** 2 * qkv.element_size()))


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d) of (B, T, d): (B, T, T)."""
    scores = _scaled_product(q, k.transpose(1, 2), q.shape[-1] ** -0.5)
    return torch.softmax(scores, dim=-1, out=scores)


def _scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale·(a @ b) of batches (B, i, j) and (B, j, k), scaled before rounding."""
    if out is None:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, with optional relative position.

    Args:
        width: D.
        num_heads: M.
        qkv_bias: bias of the query, key and value projections.
        relative: None, "decomposed" (ViTDet; no cls token) or "bias" (BEiT; one table, three more rows with cls).
        table_grid: grid whose offsets the relative tables span; other grids are served by resizing them.
        cls_token: the first token is not of the grid.
        rope_base: turn queries and keys of the patches by their place (``position.rotary_2d``); None for not.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        relative: str | None = None,
        table_grid: Grid | None = None,
        cls_token: bool = False,
        rope_base: float | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"width {width} is not a multiple of {num_heads} heads")
        if relative not in RELATIVE_KINDS:
            raise ConfigError(
                f"relative_position is {relative!r}; expected one of {', '.join(map(str, RELATIVE_KINDS))}"
            )
        self.num_heads = num_heads
        self.has_qkv_bias = qkv_bias
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.relative = relative
        self.table_grid = table_grid
        self.cls_token = cls_token
        self.rope_base = rope_base
        self._rotary: tuple[Grid, Tensor, Tensor] | None = None  # of the last grid
        if rope_base is not None and (width // num_heads) % 4:
            raise ConfigError(f"rotary positions need heads of a width divisible by 4, got {width // num_heads}")
        if relative is None:
            return
        if rope_base is not None:
            raise ConfigError(f"relative_position={relative!r} and rope_base={rope_base} exclude one another")
        assert table_grid is not None
        h, w = table_grid
        if relative == "decomposed":
            if cls_token:
                raise ConfigError("decomposed relative position has no row for a cls token; build with cls_token=False")
            head_dim = width // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * h - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * w - 1, head_dim))
            self._resized_h, self._resized_w = ResizeCache(), ResizeCache()
        else:
            num_rows = (2 * h - 1) * (2 * w - 1) + (3 if cls_token else 0)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(num_rows, num_heads))
            self._resized = ResizeCache()

    def forward(self, x: Tensor, grid: Grid | None = None, norm: nn.Module | None = None) -> Tensor:
        """(N, T, D) -> (N, T, D); ``grid`` (h, w) is needed only with relative position.

        With ``norm``, attention of norm(x): the layer before, which on a CPU is computed again rather than kept.
        """
        return self.proj(self.attend_tokens(self.project(x, norm), grid))

    def project(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Queries, keys and values of x, or of norm(x): (N, T, D) -> (N, T, 3D)."""
        return self.qkv(x) if norm is None else norm_linear(x, norm, self.qkv)

    def attend_tokens(self, qkv: Tensor, grid: Grid | None) -> Tensor:
        """Attention from projected tokens: (N, T, 3D) -> (N, T, D), before the output projection."""
        n, t, _ = qkv.shape
        if self.rope_base is not None:
            assert grid is not None
            qkv = self._rotate(qkv, grid)
        if self.relative is None and applies(qkv, qkv.shape[-1] // 3) and suits_matmul(qkv):
            return SelfAttendOnCPU.apply(qkv.contiguous(), self.num_heads)
        if self.relative is not None and runs_on_cpu(qkv):
            assert grid is not None
            return self.attend_in_pieces(qkv, grid)
        q, k, v = qkv.reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (N, M, T, d)
        if self.relative is None:
            bias = None
        else:
            assert grid is not None
            bias = self._decomposed(q, grid) if self.relative == "decomposed" else self._tabled(grid)
        out = attend(q, k, v, bias)
        return out.transpose(1, 2).reshape(n, t, -1)

    def _rotate(self, qkv: Tensor, grid: Grid) -> Tensor:
        """Turn queries and keys of the patches, the last h·w tokens, by their place: (N, T, 3D) -> (N, T, 3D)."""
        n, t, packed = qkv.shape
        d, patches = packed // 3 // self.num_heads, grid[0] * grid[1]
        cos, sin = self._rotations(grid, d, qkv.device)  # (h·w, d)
        heads = qkv.reshape(n, t, 3, self.num_heads, d)
        x = heads[:, t - patches :, :2].float()  # (N, h·w, 2, M, d)
        first, second = x.chunk(2, dim=-1)
        x = x * cos[:, None, None] + torch.cat([-second, first], dim=-1) * sin[:, None, None]
        rotated = torch.cat([heads[:, : t - patches, :2], x.to(qkv.dtype)], dim=1)  # (N, T, 2, M, d)
        return torch.cat([rotated, heads[:, :, 2:]], dim=2).reshape(n, t, packed)

    def _rotations(self, grid: Grid, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``rotary_2d``, computed anew where the grid is not that of the call before."""
        assert self.rope_base is not None
        if torch.compiler.is_compiling():  # what a compiler sees there is none of the tensors that could be kept
            return rotary_2d(grid, head_dim, base=self.rope_base, device=device)
        if self._rotary is None or self._rotary[0] != grid or self._rotary[1].device != device:
            with torch.inference_mode(False):  # training may use them next
                self._rotary = (grid, *rotary_2d(grid, head_dim, base=self.rope_base, device=device))
        return self._rotary[1:]

    def attend_in_pieces(self, qkv: Tensor, grid: Grid, window_size: int = 0) -> Tensor:
        """``attend_tokens`` for a CPU, windows included: (N, T, 3D) of real tokens -> (N, T, D)."""
        table: Tensor | None = None
        bias: type[Bias] | None = None
        window = (window_size, window_size) if window_size else grid
        if self.relative == "decomposed":
            bias, table = DecomposedBias, torch.cat([rows.flip(0) for rows in self._decomposed_tables(window)])
        elif self.relative == "bias":
            bias, table = TabledBias, self._bias_table(window)
        if table is not None:
            table = table.to(qkv.dtype)
        padding = self.qkv.bias.to(qkv.dtype) if window_size and self.has_qkv_bias else None
        return AttendInPieces.apply(qkv, padding, table, bias, self.num_heads, grid, window_size)

    def _decomposed(self, q: Tensor, grid: Grid) -> Tensor:
        """Bias (N, M, T, T) = q·R_h[Δrow] + q·R_w[Δcolumn]; the query is not scaled (ViTDet's code)."""
        h, w = grid
        n, m, t, d = q.shape
        by_height, by_width = self._decomposed_tables(grid)
        rows = relative_rows(by_height, h).to(q.dtype)  # (h, h, d): query row, key row
        columns = relative_rows(by_width, w).to(q.dtype)  # (w, w, d)
        q = q.reshape(n, m, h, w, d)
        by_row = torch.einsum("nmhwd,hkd->nmhwk", q, rows)  # (N, M, h, w, h)
        by_column = torch.einsum("nmhwd,wkd->nmhwk", q, columns)  # (N, M, h, w, w)
        return (by_row[..., :, None] + by_column[..., None, :]).reshape(n, m, t, t)

    def _tabled(self, grid: Grid) -> Tensor:
        """Bias (M, T, T) read from the table by the offset of query and key."""
        return bias_from_table(self._bias_table(grid), grid, cls_token=self.cls_token)

    def _decomposed_tables(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """R_h (2h-1, d) and R_w (2w-1, d)."""
        h, w = grid
        by_height = self._resized_h(resize_decomposed, self.rel_pos_h, 2 * h - 1)
        return by_height, self._resized_w(resize_decomposed, self.rel_pos_w, 2 * w - 1)

    def _bias_table(self, grid: Grid) -> Tensor:
        """((2h-1)(2w-1) [+ 3], M)."""
        assert self.table_grid is not None
        return self._resized(resize_bias_table, self.relative_position_bias_table, self.table_grid, grid)


class WindowAttention(Attention):
    """Attention inside non-overlapping s × s windows of the grid (ViTDet Section 3); no cls token.

    The grid is padded at the bottom and right to whole windows. As in Detectron2 the padding takes part as keys
    whose features are zero before the projection, that is, equal to the projection's bias after it; so the real
    tokens alone are projected, and the padding is filled with that bias.
    """

    def __init__(
        self, width: int, num_heads: int, *, window_size: int, qkv_bias: bool = True, relative: str | None = None
    ) -> None:
        super().__init__(width, num_heads, qkv_bias=qkv_bias, relative=relative, table_grid=(window_size, window_size))
        self.window_size = window_size

    def forward(self, x: Tensor, grid: Grid | None = None, norm: nn.Module | None = None) -> Tensor:
        """(N, h·w, D) -> (N, h·w, D)."""
        assert grid is not None
        (h, w), s = grid, self.window_size
        n, _, width = x.shape
        qkv = self.project(x, norm)  # (N, h·w, 3D)
        if runs_on_cpu(qkv):
            return self.proj(self.attend_in_pieces(qkv, grid, s))
        qkv = qkv.reshape(n, h, w, 3 * width)
        pad_h, pad_w = -h % s, -w % s
        if pad_h or pad_w:
            qkv = self._pad(qkv, pad_h, pad_w)
        num_h, num_w = (h + pad_h) // s, (w + pad_w) // s
        # (N, H', W', 3D) -> (N, num_h, s, num_w, s, 3D) -> (N·windows, s², 3D)
        windows = qkv.reshape(n, num_h, s, num_w, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, 3 * width)
        out = self.attend_tokens(windows, (s, s))  # (N·windows, s², D)
        out = out.reshape(n, num_h, num_w, s, s, width).permute(0, 1, 3, 2, 4, 5)
        out = out.reshape(n, num_h * s, num_w * s, width)[:, :h, :w]  # (N, h, w, D)
        return self.proj(out.reshape(n, h * w, width))

    def _pad(self, qkv: Tensor, pad_h: int, pad_w: int) -> Tensor:
        """(N, h, w, 3D) -> (N, h + pad_h, w + pad_w, 3D), padding = the projection of a zero token."""
        if not self.has_qkv_bias:
            return F.pad(qkv, (0, 0, 0, pad_w, 0, pad_h))
        n, h, w, channels = qkv.shape
        padded = self.qkv.bias.to(qkv.dtype).expand(n, h + pad_h, w + pad_w, channels).clone()
        padded[:, :h, :w] = qkv
        return padded


def relative_rows(table: Tensor, length: int) -> Tensor:
    """Rows of a decomposed table for every (query, key) pair: (2s-1, d) -> (length, length, d).

    The table is resized linearly when it was made for another length (as Detectron2 does).
    """
    table = resize_decomposed(table, 2 * length - 1)
    # windows[c, j] = table[c + j]; query i and key j want table[i - j + length - 1]: run over keys backwards.
    windows = table.unfold(0, length, 1).transpose(1, 2)  # (length, length, d)
    return windows.flip(1)


def bias_from_table(table: Tensor, grid: Grid, *, cls_token: bool) -> Tensor:
    """Spread a bias table ((2h-1)(2w-1) [+ 3], M) to (M, T, T), T = h·w [+ 1].

    The table is read by overlapping windows rather than by an index of T² entries: its gradient is then a sum of
    shifted slices, where the gradient of an index is a scatter that took a quarter of a training step elsewhere.
    """
    h, w = grid
    num_heads = table.shape[1]
    offsets = (2 * h - 1) * (2 * w - 1)
    image = table[:offsets].T.reshape(num_heads, 2 * h - 1, 2 * w - 1)
    # unfolded[m, a, b, c, e] = image[m, a + c, b + e]; query (a, b), key (h-1-c, w-1-e).
    unfolded = image.unfold(1, h, 1).unfold(2, w, 1)  # (M, h, w, h, w)
    bias = unfolded.flip(3, 4).reshape(num_heads, h * w, h * w)
    if not cls_token:
        return bias
    cls_to_patch, patch_to_cls, cls_to_cls = table[offsets:, :, None]  # each (M, 1)
    column = torch.cat([cls_to_cls, patch_to_cls.expand(-1, h * w)], dim=1)  # (M, T)
    bias = torch.cat([cls_to_patch[:, None].expand(-1, 1, h * w), bias], dim=1)  # (M, T, h·w)
    return torch.cat([column[:, :, None], bias], dim=2)  # (M, T, T)
