"""Positions against a literal reading of the paper's table and torch's own bicubic resize."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.position import resize_bias_table, resize_decomposed, resize_pos_embed, sincos_2d


def test_sincos_table_entry_by_entry() -> None:
    width, (h, w) = 16, (2, 3)
    table = sincos_2d(width, (h, w))[0]
    assert not table[0].any(), "the cls row is zero"
    for row in range(h):
        for column in range(w):
            expected = []
            for position in (column, row):  # width first
                angles = [position / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert table[1 + row * w + column].tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("grid_from", "grid_to"), [((14, 14), (32, 32)), ((14, 14), (7, 20)), ((4, 6), (5, 3))])
def test_resize_is_torch_bicubic_without_antialiasing(grid_from, grid_to) -> None:
    table = torch.randn(1, 1 + grid_from[0] * grid_from[1], 8)
    resized = resize_pos_embed(table, grid_from, grid_to)
    image = table[:, 1:].transpose(1, 2).reshape(1, 8, *grid_from)
    expected = F.interpolate(image, grid_to, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resized[:, 1:], expected)
    assert torch.equal(resized[:, :1], table[:, :1]), "the cls row is untouched"


def test_resize_equals_detectron2() -> None:
    get_abs_pos = pytest.importorskip("detectron2.modeling.backbone.utils").get_abs_pos
    table = torch.randn(1, 197, 8)
    ours = resize_pos_embed(table, (14, 14), (20, 31))[:, 1:].reshape(1, 20, 31, 8)
    torch.testing.assert_close(ours, get_abs_pos(table, True, (20, 31)))


def test_resize_at_the_native_grid_is_the_same_tensor() -> None:
    table = torch.randn(1, 13, 8)
    assert resize_pos_embed(table, (3, 4), (3, 4)) is table
    line = torch.randn(13, 8)
    assert resize_decomposed(line, 13) is line
    bias = torch.randn(5 * 7, 3)
    assert resize_bias_table(bias, (3, 4), (3, 4)) is bias


def test_decomposed_resize_equals_detectron2() -> None:
    get_rel_pos = pytest.importorskip("detectron2.modeling.backbone.utils").get_rel_pos
    from mae_transfer.attention import relative_rows

    for rows, length in ((27, 14), (27, 20), (27, 9)):
        table = torch.randn(rows, 4)
        torch.testing.assert_close(relative_rows(table, length), get_rel_pos(length, length, table))


def test_bias_table_resize_keeps_the_cls_rows_and_resizes_the_rest() -> None:
    table = torch.randn(5 * 5 + 3, 2)
    resized = resize_bias_table(table, (3, 3), (4, 6))
    assert resized.shape == (7 * 11 + 3, 2)
    assert torch.equal(resized[-3:], table[-3:])
    image = table[:-3].T.reshape(1, 2, 5, 5)
    expected = F.interpolate(image, (7, 11), mode="bicubic", align_corners=False).flatten(2)[0].T
    torch.testing.assert_close(resized[:-3], expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="divisible by 4"):
        sincos_2d(18, (2, 2))
    with pytest.raises(CheckpointError, match="needs 10"):
        resize_pos_embed(torch.zeros(1, 9, 4), (3, 3), (4, 4))
    with pytest.raises(CheckpointError, match="25 or 28"):
        resize_bias_table(torch.zeros(26, 4), (3, 3), (4, 4))
