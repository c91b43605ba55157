"""Pyramids against literal compositions of torch modules (Detectron2's and MMSegmentation's own are compared in
tests/detection and tests/segmentation)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mae_transfer.errors import ConfigError
from mae_transfer.pyramid import FourTapPyramid, SimpleFeaturePyramid


def test_four_taps_of_patch_16_literally() -> None:
    torch.manual_seed(0)
    width = 64
    literal = nn.ModuleList(
        [
            nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.GroupNorm(32, width),
                nn.GELU(),
                nn.ConvTranspose2d(width, width, 2, 2),
            ),
            nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2)),
            nn.Sequential(),
            nn.Sequential(nn.MaxPool2d(2, 2)),
        ]
    )
    pyramid = FourTapPyramid(width, 16)
    pyramid.levels.load_state_dict(literal.state_dict(), strict=True)
    maps = [torch.randn(2, width, 4, 6) for _ in range(4)]
    for ours, layer, x in zip(pyramid(maps), literal, maps, strict=True):
        torch.testing.assert_close(ours, layer(x))


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_strides_are_4_8_16_32_whatever_the_patch(patch: int) -> None:
    four, simple = FourTapPyramid(32, patch), SimpleFeaturePyramid(32, patch, out_channels=16)
    height, width = 2 * four.size_divisibility, 3 * four.size_divisibility
    taps = [torch.randn(1, 32, height // patch, width // patch) for _ in range(4)]
    for maps, channels in ((four(taps), 32), (simple(taps[-1]), 16)):
        assert [tuple(m.shape) for m in maps] == [(1, channels, height // s, width // s) for s in (4, 8, 16, 32)]


def test_patch_8_halves_where_patch_16_keeps() -> None:
    pyramid = FourTapPyramid(32, 8)
    kinds = [[type(layer).__name__ for layer in level] for level in pyramid.levels]
    assert kinds == [["ConvTranspose2d"], [], ["MaxPool2d"], ["MaxPool2d"]]
    x = torch.randn(1, 32, 8, 8)
    maps = pyramid([x] * 4)
    assert torch.equal(maps[1], x)
    assert torch.equal(maps[3], nn.functional.max_pool2d(x, 4))


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="given 3 maps; expected 4"):
        FourTapPyramid(32, 16)([torch.zeros(1, 32, 4, 4)] * 3)
    with pytest.raises(ConfigError, match="unknown norm 'batch'"):
        FourTapPyramid(32, 16, norm="batch")
    with pytest.raises(ConfigError, match="square patches"):
        FourTapPyramid(32, (16, 8))
    with pytest.raises(ConfigError, match="multiples of 224"):
        FourTapPyramid(32, 14)([torch.zeros(1, 32, 5, 5)] * 4)
