"""Positions against a literal reading of the paper's table and torch's own bicubic resize."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from mae_transfer import build_vit
from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.position import ResizeCache, resize_bias_table, resize_decomposed, resize_pos_embed, sincos_2d


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


class Counted:
    """A resize that says how often it was computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, table: torch.Tensor, factor: int) -> torch.Tensor:
        self.calls += 1
        return table.repeat(factor)


def test_a_table_is_resized_once_for_each_size_while_nobody_trains_it() -> None:
    cache, resize, table = ResizeCache(), Counted(), torch.nn.Parameter(torch.arange(3.0))
    with torch.no_grad():
        for factor in (2, 3, 2, 3):
            assert torch.equal(cache(resize, table, factor), table.repeat(factor))
    assert resize.calls == 2
    frozen = table.requires_grad_(False)
    assert torch.equal(cache(resize, frozen, 2), frozen.repeat(2))  # with gradients on, but not for this table
    assert resize.calls == 2


def test_a_table_that_is_trained_gets_its_gradient_in_every_step_and_is_never_stale() -> None:
    cache, resize, table = ResizeCache(), Counted(), torch.nn.Parameter(torch.arange(3.0))
    optimizer = torch.optim.SGD([table], lr=0.1)
    for _ in range(2):
        cache(resize, table, 2).sum().backward()
        with torch.no_grad():
            assert torch.equal(cache(resize, table, 2), table.repeat(2))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(cache(resize, table, 2), table.repeat(2))
            table.copy_(torch.randn(3))
            assert torch.equal(cache(resize, table, 2), table.repeat(2))
    table.data = torch.randn(3)
    other = torch.nn.Parameter(torch.randn(3))
    with torch.no_grad():
        assert torch.equal(cache(resize, table, 2), table.repeat(2))
        assert torch.equal(cache(resize, other, 2), other.repeat(2))
        assert torch.equal(cache(resize, other.double(), 2), other.double().repeat(2))


def test_what_inference_mode_kept_can_be_trained_on() -> None:
    cache, table = ResizeCache(), torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
    weight = torch.ones(6, requires_grad=True)
    with torch.inference_mode():
        cache(Counted(), table, 2)
    (cache(Counted(), table, 2) * weight).sum().backward()  # a tensor of inference mode could not be saved for this
    assert weight.grad is not None and torch.equal(weight.grad, table.repeat(2))


def test_sizes_are_bounded_and_copies_begin_empty() -> None:
    cache, resize, table = ResizeCache(), Counted(), torch.arange(3.0)
    for factor in range(2, 40):
        cache(resize, table, factor)
    assert len(cache._kept) <= 8
    assert not copy.deepcopy(cache)._kept


@pytest.mark.parametrize("relative", ["decomposed", "bias"])
def test_an_encoder_keeps_its_tables_between_images_and_follows_its_weights(relative: str) -> None:
    torch.manual_seed(0)
    vit = build_vit(
        "tiny", depth=1, image_size=32, patch_size=8, cls_token=relative == "bias", relative_position=relative
    )
    images = torch.randn(1, 3, 48, 40)
    for _ in range(2):
        with torch.no_grad():
            first = vit(images)
            kept = [
                cache for module in vit.modules() for cache in vars(module).values() if isinstance(cache, ResizeCache)
            ]
            assert kept and all(len(cache._kept) == 1 for cache in kept)
            assert torch.equal(first, vit(images))
        torch.testing.assert_close(first, vit(images), rtol=0, atol=1e-5)  # with gradients, where nothing is kept
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
