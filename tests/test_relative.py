"""Attention in pieces, as CPUs run it, against the same attention written with torch's operators and differentiated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mae_transfer import recompute, relative
from mae_transfer.attention import Attention, WindowAttention
from mae_transfer.relative import AttendInPieces, DecomposedBias, TabledBias, cut_grid

GRID = (7, 10)  # which windows of 3 do not divide
WHOLE, SOME_ROWS, ONE_ROW = 2 << 20, 3000, 1


def build(kind: str, relative_position: str | None, *, width: int = 24) -> Attention:
    """ "windows", "global", "resized" (tables made for another grid) or "cls"."""
    torch.manual_seed(0)
    attention: Attention
    if kind == "windows":
        attention = WindowAttention(width, 3, window_size=3, relative=relative_position)
    else:
        table_grid = (4, 5) if kind == "resized" else GRID
        attention = Attention(width, 3, relative=relative_position, table_grid=table_grid, cls_token=kind == "cls")
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def tokens(attention: Attention, **options: object) -> Tensor:
    number = GRID[0] * GRID[1] + attention.cls_token
    return torch.randn(3, number, attention.proj.in_features, **options)  # type: ignore[call-overload]


def with_gradients(attention: Attention, x: Tensor, weight: Tensor) -> list[Tensor]:
    out = attention(x, GRID)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *attention.parameters()])]


KINDS = [
    *[(kind, "decomposed") for kind in ("windows", "global", "resized")],
    *[(kind, "bias") for kind in ("windows", "global", "resized", "cls")],
    ("windows", None),
]


@pytest.mark.parametrize("score_bytes", [WHOLE, SOME_ROWS, ONE_ROW])
@pytest.mark.parametrize(("kind", "relative_position"), KINDS)
def test_values_and_gradients_are_those_of_the_formula(kind, relative_position, score_bytes, monkeypatch) -> None:
    monkeypatch.setattr(relative, "_SCORE_BYTES", score_bytes)
    attention = build(kind, relative_position).double()
    x = tokens(attention, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, dtype=torch.float64)
    ours = with_gradients(attention, x, weight)
    monkeypatch.setattr(recompute, "ON_CPU", False)
    for found, expected in zip(ours, with_gradients(attention, x, weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bias", [DecomposedBias, TabledBias])
@pytest.mark.parametrize("side", [0, 2])
def test_against_finite_differences(bias, side: int, monkeypatch) -> None:
    monkeypatch.setattr(relative, "_SCORE_BYTES", 64)
    torch.manual_seed(0)
    rows, columns = (side, side) if side else (3, 2)
    shape = (2 * rows + 2 * columns - 2, 2) if bias is DecomposedBias else ((2 * rows - 1) * (2 * columns - 1), 2)
    table = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    qkv = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    padding = torch.randn(12, dtype=torch.float64, requires_grad=bool(side)) if side else None
    inputs = [tensor for tensor in (qkv, table, padding) if tensor is not None]

    def run(qkv: Tensor, table: Tensor, padding: Tensor | None = None) -> Tensor:
        return AttendInPieces.apply(qkv, padding, table, bias, 2, (3, 2), side)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(("kind", "relative_position"), KINDS)
def test_bf16_is_as_close_to_float64_as_the_formula_in_bf16(kind, relative_position, monkeypatch) -> None:
    monkeypatch.setattr(relative, "_SCORE_BYTES", SOME_ROWS)
    attention = build(kind, relative_position)
    x = tokens(attention, requires_grad=True)
    weight = torch.randn(x.shape)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return with_gradients(attention, x, weight)

    ours = run()
    monkeypatch.setattr(recompute, "ON_CPU", False)
    plain = run()
    exact = with_gradients(attention.double(), x.detach().double().requires_grad_(), weight.double())
    errors = [
        [((found.double() - right).norm() / right.norm()).item() for found, right in zip(results, exact, strict=True)]
        for results in (ours, plain)
    ]
    assert [found.dtype for found in ours] == [found.dtype for found in plain]
    assert max(a / b for a, b in zip(*errors, strict=True)) < 1.25


def kept_bytes(run: Callable[[], Tensor]) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("relative_position", ["decomposed", "bias"])
def test_nothing_with_squared_tokens_is_kept(relative_position: str) -> None:
    attention = Attention(8, 1, relative=relative_position, table_grid=(20, 20))
    qkv = torch.randn(1, 400, 24, requires_grad=True)
    parameters = sum(p.untyped_storage().nbytes() for p in attention.parameters())
    kept = kept_bytes(lambda: attention.attend_tokens(qkv, (20, 20)))
    assert kept < 2 * qkv.untyped_storage().nbytes() + 2 * parameters < 400 * 400


def test_inference_takes_the_same_way_and_equals_training() -> None:
    attention = build("windows", "decomposed")
    x = tokens(attention)
    with torch.no_grad():
        inferred = attention(x, GRID)
    assert torch.equal(inferred, attention(x, GRID))


@pytest.mark.parametrize(("kind", "relative_position"), KINDS)
def test_exporters_see_plain_operators(kind, relative_position) -> None:
    attention = build(kind, relative_position).eval()
    x = tokens(attention)

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, GRID)

    with torch.no_grad():
        program = torch.export.export(Host(), (x,), strict=False)
        assert not any("AttendInPieces" in str(node) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), attention(x, GRID), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("grid", "side"), [((7, 10), 3), ((6, 6), 3), ((2, 2), 3), ((1, 7), 3)])
def test_the_parts_cover_the_grid_once(grid: tuple[int, int], side: int) -> None:
    numbers = torch.arange(grid[0] * grid[1]).view(1, *grid)
    found = torch.cat([part.cut(numbers).flatten() for part in cut_grid(grid, side)])
    assert found.sort().values.equal(numbers.flatten())


def test_frozen_tables_and_tokens_get_no_gradient() -> None:
    attention = build("windows", "decomposed").requires_grad_(False)
    attention.proj.requires_grad_(True)
    attention(tokens(attention), GRID).sum().backward()
    assert attention.rel_pos_h.grad is None and attention.qkv.bias.grad is None
    assert attention.proj.weight.grad is not None
