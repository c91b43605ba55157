"""Relative position and windows against index-by-index constructions (Detectron2 and MMSegmentation as a whole are
compared in tests/detection and tests/segmentation)."""

from __future__ import annotations

import pytest
import torch

from mae_transfer import attention, recompute
from mae_transfer.attention import Attention, SelfAttendOnCPU, WindowAttention, attend, bias_from_table


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_both_implementations_agree_with_float64(dtype, with_bias: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, dtype=dtype) for _ in range(3))
    bias = torch.randn(3, 20, 20, dtype=dtype) if with_bias else None
    scores = q.double() @ k.double().transpose(2, 3) / 8**0.5 + (0 if bias is None else bias.double())
    exact = scores.softmax(-1) @ v.double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for longest in (0, 10**6):
        monkeypatch.setattr(attention, "_CPU_MATMUL_TOKENS_HALF", longest)
        monkeypatch.setattr(attention, "_CPU_MATMUL_TOKENS_FLOAT", longest)
        torch.testing.assert_close(attend(q, k, v, bias).double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 6)])
def test_bias_table_is_read_by_offset(grid: tuple[int, int], cls_token: bool) -> None:
    h, w = grid
    offsets = (2 * h - 1) * (2 * w - 1)
    table = torch.randn(offsets + 3 * cls_token, 2)
    bias = bias_from_table(table, grid, cls_token=cls_token)
    first = int(cls_token)
    for query in range(h * w):
        for key in range(h * w):
            row = (query // w - key // w + h - 1) * (2 * w - 1) + (query % w - key % w + w - 1)
            assert torch.equal(bias[:, first + query, first + key], table[row])
    if cls_token:
        assert torch.equal(bias[:, 0, 1:], table[offsets][:, None].expand(2, h * w)), "cls to patch"
        assert torch.equal(bias[:, 1:, 0], table[offsets + 1][:, None].expand(2, h * w)), "patch to cls"
        assert torch.equal(bias[:, 0, 0], table[offsets + 2]), "cls to cls"


@pytest.mark.parametrize("relative", [None, "decomposed", "bias"])
@pytest.mark.parametrize("grid", [(6, 9), (7, 10), (2, 2)])
def test_windows_equal_global_attention_inside_each_padded_window(relative, grid: tuple[int, int]) -> None:
    """Cut and pad by hand with zero tokens, run the global attention on each window, put together again."""
    torch.manual_seed(0)
    s, (h, w) = 3, grid
    windowed = WindowAttention(12, 3, window_size=s, relative=relative).double()
    whole = Attention(12, 3, relative=relative, table_grid=(s, s)).double()
    for p in windowed.parameters():
        torch.nn.init.normal_(p)
    whole.load_state_dict(windowed.state_dict(), strict=True)
    x = torch.randn(2, h * w, 12, dtype=torch.float64)
    padded = torch.zeros(2, -(-h // s) * s, -(-w // s) * s, 12, dtype=torch.float64)
    padded[:, :h, :w] = x.reshape(2, h, w, 12)
    out = torch.empty_like(padded)
    for top in range(0, padded.shape[1], s):
        for left in range(0, padded.shape[2], s):
            window = padded[:, top : top + s, left : left + s].reshape(2, s * s, 12)
            out[:, top : top + s, left : left + s] = whole(window, (s, s)).reshape(2, s, s, 12)
    torch.testing.assert_close(windowed(x, grid), out[:, :h, :w].reshape(2, h * w, 12))


@pytest.mark.parametrize("images_at_a_time", [1, 2, 8])
def test_packed_self_attention_equals_autograd_of_the_formula(images_at_a_time: int, monkeypatch) -> None:
    """Any number of images at a time, the last piece a shorter one; to the second check, float64's own differences."""
    torch.manual_seed(0)
    n, t, m, d = 5, 7, 3, 4
    monkeypatch.setattr(attention, "_CPU_SCORE_BYTES", images_at_a_time * m * t * t * 8)
    qkv = torch.randn(n, t, 3 * m * d, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(n, t, m * d, dtype=torch.float64)

    q, k, v = qkv.reshape(n, t, 3, m, d).permute(2, 0, 3, 1, 4)
    exact = ((q @ k.transpose(2, 3) / d**0.5).softmax(-1) @ v).transpose(1, 2).reshape(n, t, m * d)
    (expected,) = torch.autograd.grad(exact, qkv, probe)
    out = SelfAttendOnCPU.apply(qkv, m)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, probe)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(SelfAttendOnCPU.apply(qkv, m), exact)
    assert torch.autograd.gradcheck(lambda x: SelfAttendOnCPU.apply(x, m), qkv[:3, :4].detach().requires_grad_())


def test_packed_self_attention_in_bf16_is_no_less_exact_than_autograd(monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(recompute, "MIN_WIDTH", 0)
    module = Attention(64, 4).double()
    n, t = 6, 33
    qkv = torch.randn(n, t, 192).bfloat16()
    probe = torch.randn(n, t, 64).bfloat16()

    def gradient(x: torch.Tensor, by_formula: bool) -> torch.Tensor:
        x = x.detach().requires_grad_()
        if by_formula:
            q, k, v = x.reshape(n, t, 3, 4, 16).permute(2, 0, 3, 1, 4)
            out = attend(q, k, v).transpose(1, 2).reshape(n, t, 64)
        else:
            out = module.attend_tokens(x, None)
            assert type(out.grad_fn).__name__ == "SelfAttendOnCPUBackward"
        return torch.autograd.grad(out, x, probe.to(x.dtype))[0].double()

    exact = gradient(qkv.double(), True)
    errors = [(gradient(qkv, by_formula) - exact).norm() / exact.norm() for by_formula in (True, False)]
    assert errors[1] <= 1.05 * errors[0] < 0.01
