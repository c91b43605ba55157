"""Sliding windows against MMSegmentation's, and where theirs is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from mae_transfer.segmentation.geometry import whole_maps, window_counts, window_starts


@pytest.fixture
def model(tiny_config):
    """A light UperNet in float32 with windows of 64 pixels, five at a time."""
    torch.manual_seed(0)
    config = tiny_config(train={"precision": "fp32"}, test={"window_batch": 5})
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
    with torch.no_grad():
        model.decode_head.conv_seg.weight.normal_(std=0.5)  # logits that show
    return model.eval()


def metas(images: Tensor) -> list[dict]:
    return [{"ori_shape": tuple(images.shape[2:]), "img_shape": tuple(images.shape[2:])} for _ in images]


@pytest.mark.parametrize("size", [(64, 64), (64, 100), (90, 150), (128, 65)])
@torch.no_grad()
def test_windows_equal_mmsegs_where_theirs_works(model, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    ours = model.slide_inference(images, metas(images))
    reference = EncoderDecoder.slide_inference(model, images, metas(images))
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(40, 64), (64, 33), (20, 100), (31, 17)])
@torch.no_grad()
def test_small_images_are_padded_to_the_window(model, size: tuple[int, int]) -> None:
    """Against windows of a zero-padded image, one by one, in float64."""
    images = torch.randn(1, 3, *size)
    ours = model.slide_inference(images, metas(images))
    double = copy.deepcopy(model).double()
    height, width = max(size[0], 64), max(size[1], 64)
    padded = F.pad(images, (0, width - size[1], 0, height - size[0])).double()
    total = torch.zeros(1, 4, height, width, dtype=torch.float64)
    count = torch.zeros(1, 1, height, width)
    for left in sorted({min(left, width - 64) for left in range(0, width, 42)}):
        window = double.decode_head.forward(double.extract_feat(padded[:, :, :, left : left + 64]))
        total[..., left : left + 64] += F.interpolate(window, size=(64, 64), mode="bilinear", align_corners=False)
        count[..., left : left + 64] += 1
    reference = (total / count)[:, :, : size[0], : size[1]].float()
    assert ours.shape == (1, 4, *size)
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_metadata_is_left_alone(model) -> None:
    images = torch.randn(1, 3, 90, 150)
    given = metas(images)
    before = copy.deepcopy(given)
    model.slide_inference(images, given)
    assert given == before


@torch.no_grad()
def test_whole_images_of_any_size_keep_logits_on_their_pixels(model) -> None:
    """Padding must not stretch: logits of an image equal those of the image padded by hand, on its pixels."""
    images = torch.randn(1, 3, 61, 75)
    logits = model.encode_decode(images, metas(images))
    padded = F.pad(images, (0, 5, 0, 3))
    torch.testing.assert_close(logits, model.encode_decode(padded, metas(padded))[:, :, :61, :75])


def test_window_batches_are_full(model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    encode = model.encode_decode
    monkeypatch.setattr(model, "encode_decode", lambda x, m: (sizes.append(len(x)), encode(x, m))[1])
    images = torch.randn(1, 3, 100, 200)
    with torch.no_grad():
        model.slide_inference(images, metas(images))
    assert sum(sizes) == len(window_starts(100, 64, 42)) * len(window_starts(200, 64, 42)) == 10
    assert sizes == [5, 5]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_inference_runs_in_the_precision_asked_for(model, precision: str, dtype: torch.dtype) -> None:
    model.test_cfg["precision"] = precision
    seen = []
    model.backbone.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = model.inference(images, metas(images))
    assert seen == [dtype]
    assert logits.dtype == torch.float32


def test_windows_cover_the_side_and_end_at_its_border() -> None:
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(300, 512, 341) == [0]
    assert window_starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]


def test_pixels_lie_in_one_window_at_least() -> None:
    assert window_counts(6, 4, window_starts(6, 4, 2)) == [1, 1, 2, 2, 1, 1]
    for length in (64, 65, 100, 150, 200):
        counts = window_counts(length, 64, window_starts(length, 64, 42))
        assert min(counts) == 1
        assert sum(counts) == 64 * len(window_starts(length, 64, 42))


def test_sizes_that_give_whole_maps() -> None:
    assert [whole_maps(patch) for patch in (8, 14, 16)] == [8, 112, 16]
