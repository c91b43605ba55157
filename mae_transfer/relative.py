"""Attention in windows and with relative position on CPUs, by pieces that stay in the processor's cache.

As written with torch's operators, the scores (N, M, T, T) and their bias pass through memory half a dozen times and
are kept for the backward pass; windows are padded, and attention is computed for queries that are dropped afterwards.
Here a piece at a time (some windows, some heads, some rows of queries) goes all the way from its bias to its output,
and the backward pass computes the scores again. Real queries alone are computed, and nothing with T² entries is kept.

Shapes: N batch, T tokens, D width, M heads, d = D / M, (h, w) patch grid. In a piece: m heads, B windows, t queries
in rows of c, and (h', w') keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mae_transfer.position import Grid

# As much of the scores at a time: they then stay in the cache between the product, the softmax and the next product.
_SCORE_BYTES = 3 << 20
# In half precision, sums over so short rows of keys are slower than products with zeros and ones: 4 to 10 times at 14.
_NARROW = 32
# An odd number of keys leaves every other row of scores unaligned: a product that is added to them then takes twice as
# long in float32. Keys are filled up to a multiple of this.
_ALIGNED = 16


@dataclass(frozen=True)
class Windows:
    """A part of the grid that is cut into equal windows.

    Attributes:
        top, left: first patch of the part.
        counts: windows below and beside one another.
        queries: (rows, columns) of patches in each.
        keys: (rows, columns) of each with its padding, which is at the bottom and right.
    """

    top: int
    left: int
    counts: Grid
    queries: Grid
    keys: Grid

    def cut(self, x: Tensor) -> Tensor:
        """A view: (N, h, w, …) -> (N, windows below, windows beside, rows, columns, …)."""
        (num_h, num_w), (rows, columns) = self.counts, self.queries
        part = x[:, self.top : self.top + num_h * rows, self.left : self.left + num_w * columns]
        return part.unflatten(2, (num_w, columns)).unflatten(1, (num_h, rows)).transpose(2, 3)


def cut_grid(grid: Grid, side: int) -> list[Windows]:
    """The whole windows, and those that the right and the lower edge cut short."""

    def lengths(length: int) -> list[tuple[int, int, int]]:  # (first patch, windows, patches of each)
        whole, rest = divmod(length, side)
        return [part for part in ((0, whole, side), (whole * side, 1, rest)) if part[1] and part[2]]

    return [
        Windows(top, left, (num_h, num_w), (rows, columns), (side, side))
        for top, num_h, rows in lengths(grid[0])
        for left, num_w, columns in lengths(grid[1])
    ]


@dataclass(frozen=True)
class Step:
    """Which scores of a piece are computed at once: of some heads, for some rows of queries, in all its windows."""

    heads: slice
    num_windows: int
    first_row: int
    rows: int
    columns: int
    num_cls: int  # tokens before the grid's: 0 or 1

    @property
    def begins_with_cls(self) -> bool:
        """A cls token goes with the first rows."""
        return bool(self.num_cls) and self.first_row == 0

    def queries(self, x: Tensor) -> Tensor:
        """A view of contiguous (M, B, T, d): (m·B, t, d)."""
        first = self.num_cls + self.first_row * self.columns
        tokens = slice(0 if self.begins_with_cls else first, first + self.rows * self.columns)
        return x[self.heads, :, tokens].view(-1, tokens.stop - tokens.start, x.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """A view of contiguous (M, B, T, d): (m·B, T, d)."""
        return x[self.heads].view(-1, *x.shape[2:])


class Bias(Protocol):
    """What is added to the scores, for the one pass that it is made for."""

    #: The keys come last first (tokens, and the patches' rows and columns), and may be followed by some to be left out.
    keys_reversed: bool

    def __init__(self, table: Tensor, keys: Grid) -> None: ...

    @property
    def grad(self) -> Tensor:
        """Gradient of the table that this was made from, after ``backward`` for every step."""

    def fill(self, scores: Tensor, q: Tensor, step: Step) -> None:
        """Write the bias of queries (m·B, t, d) to ``scores`` (m·B, t, keys)."""

    def backward(self, grad_scores: Tensor, q: Tensor, grad_q: Tensor, step: Step) -> None:
        """Add what comes by the bias to ``grad`` and to ``grad_q``."""


class DecomposedBias:
    """q·R_h[Δrow] + q·R_w[Δcolumn] of queries that are not scaled (ViTDet's code).

    The queries' products with all rows of both tables are one matrix product. What a query takes of them begins one
    entry earlier in each further row (column) of queries, which a view with skewed strides reads as it is.

    Args:
        table: (2h'-1 + 2w'-1, d): R_h, then R_w, each beginning with the key furthest before its query.
    """

    keys_reversed = False

    def __init__(self, table: Tensor, keys: Grid) -> None:
        h, w = self.keys = keys
        self.table = table
        self.grad = torch.zeros_like(table, dtype=_sum_dtype(table))
        self._members: Tensor | None = None  # (h' + w', h'·w'): which keys are in a row, in a column
        if w < _NARROW and table.element_size() == 2:
            rows, columns = torch.eye(h, dtype=table.dtype), torch.eye(w, dtype=table.dtype)
            self._members = torch.cat([rows.repeat_interleave(w, dim=1), columns.repeat(1, h)])

    def fill(self, scores: Tensor, q: Tensor, step: Step) -> None:
        by_row, by_column = self._own(q @ self.table.t(), step)
        if self._members is None:
            torch.add(by_row[..., :, None], by_column[..., None, :], out=scores.view(*by_row.shape, self.keys[1]))
        else:
            own = torch.cat([by_row, by_column], dim=-1).flatten(0, 2)
            torch.mm(own, self._members, out=scores.flatten(0, 1))

    def backward(self, grad_scores: Tensor, q: Tensor, grad_q: Tensor, step: Step) -> None:
        products = q.new_zeros(*q.shape[:2], len(self.table))
        by_row, by_column = self._own(products, step)
        if self._members is None:
            grad_scores = grad_scores.view(*by_row.shape, self.keys[1])  # (m·B, r, c, h', w')
            by_row.copy_(grad_scores.sum(-1))
            by_column.copy_(grad_scores.sum(-2))
        else:
            own = (grad_scores.flatten(0, 1) @ self._members.t()).view(*by_row.shape[:3], -1)
            by_row.copy_(own[..., : self.keys[0]])
            by_column.copy_(own[..., self.keys[0] :])
        grad_q += products @ self.table
        self.grad += products.flatten(0, 1).t() @ q.flatten(0, 1)

    def _own(self, products: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Views of contiguous (m·B, t, 2h'-1 + 2w'-1): (m·B, r, c, h') by key row, (m·B, r, c, w') by key column."""
        (h, w), (batch, t, length) = self.keys, products.shape
        row = step.columns * length
        by_row = products.as_strided(
            (batch, step.rows, step.columns, h), (t * length, row - 1, length, 1), h - 1 - step.first_row
        )
        by_column = products.as_strided(
            (batch, step.rows, step.columns, w), (t * length, row, length - 1, 1), (2 * h - 1) + (w - 1)
        )
        return by_row, by_column


class TabledBias:
    """One entry of a table for every offset of query and key (BEiT); three more for a cls token, the first one.

    Query (a, b) and key (h'-1-e, w'-1-f) read entry (a + e, b + f). With the keys last first, and a copy of the table
    for every column b, what a query reads is one run of h'·w' entries that begins w' further in each further row.

    Args:
        table: ((2h'-1)(2w'-1) [+ 3], M).
    """

    keys_reversed = True

    def __init__(self, table: Tensor, keys: Grid) -> None:
        h, w = self.keys = keys
        self.num_keys = h * w
        num_offsets = (2 * h - 1) * (2 * w - 1)
        image = table[:num_offsets].t().reshape(-1, 2 * h - 1, 2 * w - 1)
        columns = image.unfold(2, w, 1).transpose(1, 2).flatten(2)  # (M, w', (2h'-1)·w')
        self.runs = columns.unfold(2, h * w, w).transpose(1, 2)  # (M, h', w', h'·w'), a view
        self.cls_rows = table[num_offsets:, :, None, None]  # (0 or 3, M, 1, 1)
        self._grad_columns = torch.zeros_like(columns, dtype=_sum_dtype(table))
        self._grad_cls = torch.zeros_like(table[num_offsets:], dtype=_sum_dtype(table))

    def fill(self, scores: Tensor, q: Tensor, step: Step) -> None:
        scores = scores.unflatten(0, (-1, step.num_windows))  # (m, B, t, keys)
        runs = self.runs[step.heads, step.first_row : step.first_row + step.rows, : step.columns]
        self._patches(scores, step).copy_(runs[:, None])
        num_keys = self.num_keys
        if len(self.cls_rows):
            cls_to_patch, patch_to_cls, cls_to_cls = self.cls_rows[:, step.heads]  # each (m, 1, 1)
            scores[..., num_keys] = patch_to_cls
            if step.begins_with_cls:
                scores[..., 0, :num_keys] = cls_to_patch
                scores[..., 0, num_keys] = cls_to_cls[..., 0]
            num_keys += 1
        scores[..., num_keys:] = -torch.inf  # what the keys were filled up with

    def backward(self, grad_scores: Tensor, q: Tensor, grad_q: Tensor, step: Step) -> None:
        (h, w), first = self.keys, int(step.begins_with_cls)
        grad_scores = grad_scores.unflatten(0, (-1, step.num_windows))
        if step.num_windows == 1:
            grad_scores = grad_scores[:, 0]  # (m, t, keys)
        else:
            grad_scores = grad_scores.sum(1, dtype=self._grad_columns.dtype)
        patches = self._patches(grad_scores, step)  # (m, r, c, h'·w')
        columns = patches.new_zeros(len(patches), step.columns, (step.rows + h - 1) * w)
        for row in range(step.rows):
            columns[..., row * w : (row + h) * w] += patches[:, row]
        rows = slice(step.first_row * w, (step.first_row + step.rows + h - 1) * w)
        self._grad_columns[step.heads, : step.columns, rows] += columns
        if len(self.cls_rows):
            cls_to_patch, patch_to_cls, cls_to_cls = self._grad_cls[:, step.heads]  # each (m,)
            patch_to_cls += grad_scores[:, first:, self.num_keys].sum(1)
            if step.begins_with_cls:
                cls_to_patch += grad_scores[:, 0, : self.num_keys].sum(1)
                cls_to_cls += grad_scores[:, 0, self.num_keys]

    @property
    def grad(self) -> Tensor:
        h, w = self.keys
        columns = self._grad_columns.unflatten(2, (2 * h - 1, w))
        image = columns.new_zeros(len(columns), 2 * h - 1, 2 * w - 1)
        for column in range(w):
            image[..., column : column + w] += columns[:, column]
        return torch.cat([image.flatten(1).t(), self._grad_cls])

    def _patches(self, scores: Tensor, step: Step) -> Tensor:
        """A view of (…, t, keys) without the cls token: (…, r, c, h'·w')."""
        patches = scores[..., int(step.begins_with_cls) :, : self.num_keys]
        return patches.unflatten(-2, (step.rows, step.columns))


class AttendInPieces(torch.autograd.Function):
    """softmax(q·kᵀ/√d + bias)·v of one packed tensor, (N, T, 3D) -> (N, T, D).

    Args:
        qkv: queries, keys and values of the real tokens: [the cls token and] those of the grid row by row.
        padding: (3D,), what the tokens are projected to that fill up windows; None for zeros.
        table: of the bias, in the dtype of ``qkv``; None without bias.
        bias: what adds it, ``DecomposedBias`` or ``TabledBias``.
        num_heads: M.
        grid: (h, w).
        side: of the windows in patches; 0 for global attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        padding: Tensor | None,
        table: Tensor | None,
        bias: type[Bias] | None,
        num_heads: int,
        grid: Grid,
        side: int,
    ) -> Tensor:
        ctx.save_for_backward(qkv, padding, table)
        ctx.plan = plan = _Plan(bias, num_heads, grid, side)
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        room = _Room(qkv)
        for part in plan.parts(qkv.shape[1]):
            added = plan.bias_of(table, part)
            source, target = plan.cut(qkv, part, 3), plan.cut(out, part, 1)
            for piece in plan.pieces(source, part):
                q, k, v = plan.gather(source[piece], part, padding)
                found = torch.empty_like(q)
                for step in plan.steps(q, k, part):
                    p = _probabilities(step.queries(q), step.keys(k), added, step, room)
                    _write_product(step.queries(found), p, step.keys(v))
                target[piece] = found.view_as(target[piece])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, padding, table = ctx.saved_tensors
        plan: _Plan = ctx.plan
        scale = (qkv.shape[2] // 3 // plan.num_heads) ** -0.5
        room, more_room = _Room(qkv), _Room(qkv)
        grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        grad_padding = None if padding is None else torch.zeros_like(padding, dtype=_sum_dtype(padding))
        grad_table = None if table is None else torch.zeros_like(table, dtype=_sum_dtype(table))
        for part in plan.parts(qkv.shape[1]):
            added = plan.bias_of(table, part)
            source, grads = plan.cut(qkv, part, 3), plan.cut(grad_out, part, 1)
            target = plan.cut(grad_qkv, part, 3)
            for piece in plan.pieces(source, part):
                q, k, v = plan.gather(source[piece], part, padding)
                g = grads[piece].contiguous().view_as(q)
                grad_q = torch.empty_like(q)
                steps = plan.steps(q, k, part)
                # Where keys get their gradient from several steps, it is summed in float32.
                grad_kv = q.new_empty(2, *k.shape, dtype=q.dtype if steps[-1].first_row == 0 else _sum_dtype(q))
                for step in steps:
                    some_q, some_k, some_g = step.queries(q), step.keys(k), step.queries(g)
                    some_grad_q = step.queries(grad_q)
                    p = _probabilities(some_q, some_k, added, step, room)
                    _write_product(step.keys(grad_kv[1]), p.transpose(1, 2), some_g, add=step.first_row > 0)
                    grad_scores = more_room.of(p.shape)
                    _write_product(grad_scores, some_g, step.keys(v).transpose(1, 2))
                    torch._softmax_backward_data(grad_scores, p, -1, p.dtype, grad_input=grad_scores)
                    _write_product(some_grad_q, grad_scores, some_k, scale=scale)
                    _write_product(
                        step.keys(grad_kv[0]), grad_scores.transpose(1, 2), some_q, scale=scale, add=step.first_row > 0
                    )
                    if added is not None:
                        added.backward(grad_scores, some_q, some_grad_q, step)
                target[:1][piece] = grad_q.view_as(target[:1][piece])
                plan.scatter_keys(grad_kv, target[1:][piece], part, grad_padding)
            if added is not None:
                assert grad_table is not None
                grad_table += added.grad
        return (
            grad_qkv,
            None if grad_padding is None else grad_padding.to(padding.dtype),
            None if grad_table is None else grad_table.to(table.dtype),
            None,
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Plan:
    """How ``AttendInPieces`` goes through its tokens."""

    bias: type[Bias] | None
    num_heads: int
    grid: Grid
    side: int

    def parts(self, num_tokens: int) -> list[Windows]:
        """Global attention is one window, where all tokens stand in one row."""
        if self.side:
            return cut_grid(self.grid, self.side)
        return [Windows(0, 0, (1, 1), (1, num_tokens), (1, num_tokens))]

    def bias_of(self, table: Tensor | None, part: Windows) -> Bias | None:
        if self.bias is None:
            return None
        assert table is not None
        return self.bias(table, part.keys if self.side else self.grid)

    def cut(self, x: Tensor, part: Windows, kinds: int) -> Tensor:
        """A view: (N, T, kinds·D) -> (kinds, M, N, windows below, windows beside, rows, columns, d)."""
        lattice = self.grid if self.side else (1, x.shape[1])
        windows = part.cut(x.unflatten(2, (kinds, self.num_heads, -1)).unflatten(1, lattice))
        return windows.permute(5, 6, 0, 1, 2, 3, 4, 7)

    def pieces(self, tokens: Tensor, part: Windows) -> Iterator[tuple[slice, ...]]:
        """Slices of images and rows of windows of tokens that were cut."""
        num_images, (num_h, num_w) = tokens.shape[2], part.counts
        window = self.num_heads * math.prod(part.queries) * math.prod(part.keys) * tokens.element_size()
        images_at_a_time = max(1, _SCORE_BYTES // (window * num_h * num_w))
        rows_at_a_time = num_h if images_at_a_time > 1 else max(1, _SCORE_BYTES // (window * num_w))
        every = slice(None)
        for image in range(0, num_images, images_at_a_time):
            for row in range(0, num_h, rows_at_a_time):
                yield every, every, slice(image, image + images_at_a_time), slice(row, row + rows_at_a_time)

    def gather(self, tokens: Tensor, part: Windows, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A piece (3, M, b, …) -> contiguous q (M, B, t, d), and k and v (M, B, keys, d) as the bias orders them."""
        _, num_heads, *windows, rows, columns, d = tokens.shape
        q = tokens[0].contiguous()
        if part.queries == part.keys:
            kv = tokens[1:].contiguous()
        else:
            kv = tokens.new_empty(2, num_heads, *windows, *part.keys, d)
            if padding is None:
                kv.zero_()
            else:
                kv.copy_(padding.view(3, num_heads, 1, 1, 1, 1, 1, d)[1:])
            kv[..., :rows, :columns, :] = tokens[1:]
        kv = kv.view(2, num_heads, -1, math.prod(part.keys), d)
        if self._reversed:
            kv = _last_first(kv, aligned=True)
        return q.view(num_heads, -1, rows * columns, d), kv[0], kv[1]

    def scatter_keys(self, grad: Tensor, target: Tensor, part: Windows, grad_padding: Tensor | None) -> None:
        """Gradients of the k and v that ``gather`` gave, (2, M, B, keys, d) -> of the tokens, and of the padding."""
        if self._reversed:
            grad = _last_first(grad[..., : math.prod(part.keys), :])
        (rows, columns), windows = part.queries, target.shape[:-3]
        grad = grad.view(*windows, *part.keys, -1)
        target.copy_(grad[..., :rows, :columns, :])
        if grad_padding is not None and part.queries != part.keys:
            grad[..., :rows, :columns, :] = 0
            total = grad.sum((2, 3, 4, 5, 6), dtype=grad_padding.dtype)  # (2, M, d)
            grad_padding.view(3, *total.shape[1:])[1:] += total

    def steps(self, q: Tensor, k: Tensor, part: Windows) -> list[Step]:
        """All heads and queries of a piece."""
        rows, columns = part.queries if self.side else self.grid
        num_cls = q.shape[2] - rows * columns
        row_of_scores = q.shape[1] * columns * k.shape[2] * q.element_size()
        num_steps = math.ceil(rows * row_of_scores / _SCORE_BYTES)
        rows_at_a_time = math.ceil(rows / num_steps)  # as equal as they can be: a short step costs as many calls
        heads_at_a_time = max(1, _SCORE_BYTES // (row_of_scores * rows))
        return [
            Step(
                slice(head, min(head + heads_at_a_time, self.num_heads)),
                q.shape[1],
                row,
                min(rows_at_a_time, rows - row),
                columns,
                num_cls,
            )
            for head in range(0, self.num_heads, heads_at_a_time)
            for row in range(0, rows, rows_at_a_time)
        ]

    @property
    def _reversed(self) -> bool:
        return self.bias is not None and self.bias.keys_reversed


def _last_first(x: Tensor, *, aligned: bool = False) -> Tensor:
    """(2, M, B, T, d) with its tokens in reverse; rows are copied whole, which is faster than ``flip`` here.

    With ``aligned``, an odd number is filled up, with any of them.
    """
    tokens = torch.arange(x.shape[3] - 1, -1, -1, device=x.device)
    if aligned and len(tokens) % 2:
        tokens = torch.cat([tokens, tokens.new_zeros(-len(tokens) % _ALIGNED)])
    return x.index_select(3, tokens)


class _Room:
    """Memory that every step uses again: new memory would be cleared by the system first, which takes as long."""

    def __init__(self, like: Tensor) -> None:
        self._flat = like.new_empty(0)

    def of(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if size > len(self._flat):
            self._flat = self._flat.new_empty(size)
        return self._flat[:size].view(shape)


def _probabilities(q: Tensor, k: Tensor, added: Bias | None, step: Step, room: _Room) -> Tensor:
    """softmax(q·kᵀ/√d + bias), (m·B, t, d) and (m·B, keys, d) -> (m·B, t, keys)."""
    scores = room.of((*q.shape[:2], k.shape[1]))
    if added is not None:
        added.fill(scores, q, step)
    _write_product(scores, q, k.transpose(1, 2), scale=q.shape[-1] ** -0.5, add=added is not None)
    return torch.softmax(scores, dim=-1, out=scores)


def _write_product(target: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, add: bool = False) -> None:
    """scale·(a @ b) of batches to ``target``, or added to what is there."""
    if target.dtype == a.dtype:
        torch.baddbmm(target, a, b, beta=float(add), alpha=scale, out=target)
    else:
        product = torch.baddbmm(a.new_empty(target.shape), a, b, beta=0, alpha=scale)
        if add:
            target += product
        else:
            target.copy_(product)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """In which many gradients are summed: float32 for narrower types."""
    return torch.promote_types(x.dtype, torch.float32)
