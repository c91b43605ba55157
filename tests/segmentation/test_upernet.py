"""MAEUPerHead against MMSegmentation's UPerHead with the same parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from torch import Tensor, nn

from mae_transfer import recompute
from mae_transfer.segmentation.upernet import MAEUPerHead, conv_of_enlarged

STRIDES = (4, 8, 16, 32)


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs with the same parameters and statistics, every one of which shows."""
    torch.manual_seed(0)
    arguments = {
        "in_channels": [12] * 4,
        "in_index": [0, 1, 2, 3],
        "pool_scales": (1, 2),
        "channels": 20,
        "num_classes": 5,
        "dropout_ratio": 0.0,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
        **options,
    }
    ours, theirs = MAEUPerHead(**arguments), UPerHead(**arguments)
    for name, tensor in ours.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith("running_var") else tensor.normal_(std=0.3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def maps(height: int, width: int, **options: Any) -> list[Tensor]:
    return [torch.randn(2, 12, height // s, width // s, **options) for s in STRIDES]


@pytest.mark.filterwarnings("ignore:When align_corners=True:UserWarning")  # of sizes, by MMSegmentation
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("norm", [{"type": "BN"}, {"type": "GN", "num_groups": 4}, None])
@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
def test_logits_and_gradients_equal_mmsegs(size: tuple[int, int], norm: dict | None, align_corners: bool) -> None:
    ours, theirs = (head.double() for head in pair(norm_cfg=norm, align_corners=align_corners))
    inputs = maps(*size, dtype=torch.float64, requires_grad=True)
    results = []
    for head in (ours, theirs):
        logits = head(inputs)
        parameters = dict(head.named_parameters())
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [*inputs, *parameters.values()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_it_takes_maps_that_are_no_halves_of_one_another() -> None:
    ours, theirs = (head.double().eval() for head in pair())
    inputs = [torch.randn(1, 12, *size, dtype=torch.float64) for size in ((15, 22), (8, 11), (4, 5), (2, 2))]
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-9, atol=1e-9)


def test_bf16_is_about_as_close_to_float64_as_theirs_in_bf16() -> None:
    ours, theirs = (head.eval() for head in pair())
    inputs = maps(128, 128)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found = [head(inputs) for head in (ours, theirs)]
        exact = theirs.double()([x.double() for x in inputs])
    errors = [((logits.double() - exact).norm() / exact.norm()).item() for logits in found]
    assert [logits.dtype for logits in found] == [torch.bfloat16] * 2
    assert errors[0] < 1.25 * errors[1]


def test_the_convolution_of_an_enlarged_map() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    enlarged = F.interpolate(x, size=(20, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(conv_of_enlarged(x, weight, (20, 9)), F.conv2d(enlarged, weight, padding=1))


def test_nothing_of_the_largest_size_with_all_channels_is_made() -> None:
    """What UPerHead concatenates, and keeps for the backward pass, is as large as everything else together."""
    ours, _ = pair()
    inputs = maps(128, 128, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(inputs)
    assert max(kept.values()) < 4 * 2 * 20 * 32 * 32 * 4  # bytes, images, channels, pixels, maps


def test_exporters_see_mmsegs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "ON_CPU", False)
    ours, theirs = (head.eval() for head in pair())
    inputs = maps(64, 64)
    assert torch.equal(ours(inputs), theirs(inputs))
