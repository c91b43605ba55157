"""Encoders brought to other patches, against timm's and the property that FlexiViT asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import patch_embed

from mae_transfer import build_vit, load_backbone
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.checkpoint.resize import resize_projection
from mae_transfer.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(("old", "new"), [((14, 14), (16, 16)), ((16, 16), (14, 14)), ((8, 6), (12, 16))])
def test_pseudo_inverse_is_timms_and_the_best_there_is(
    old: tuple[int, int], new: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 3, *old)
    resized = resize_projection(weight, new, method="pinv")
    monkeypatch.setattr(patch_embed, "DTYPE_INTERMEDIATE", torch.float64)  # timm inverts in single precision
    theirs = patch_embed.resample_patch_embed(weight, list(new), interpolation="bicubic", antialias=True)
    torch.testing.assert_close(resized, theirs, rtol=0, atol=1e-6)
    # FlexiViT, Section 3.4: of all kernels the one whose tokens of resized patches are nearest to those of the patches.
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).reshape(-1, 1, *old)
    resizing = F.interpolate(pixels, size=new, mode="bicubic", antialias=True).flatten(1).numpy()
    best = np.linalg.lstsq(resizing, weight.double().reshape(24, -1).numpy().T, rcond=None)[0].T.reshape(8, 3, *new)
    np.testing.assert_allclose(resized.numpy(), best, rtol=0, atol=1e-6)


def test_pseudo_inverse_keeps_the_token_of_an_enlarged_patch() -> None:
    torch.manual_seed(0)
    weight, patch = torch.randn(8, 3, 14, 14, dtype=torch.float64), torch.randn(1, 3, 14, 14, dtype=torch.float64)
    larger = F.interpolate(patch, size=(16, 16), mode="bicubic", align_corners=False, antialias=True)
    resized = resize_projection(weight, (16, 16), method="pinv")
    torch.testing.assert_close(F.conv2d(larger, resized), F.conv2d(patch, weight), rtol=0, atol=1e-9)


def test_bicubic_is_vitdets() -> None:
    weight = torch.randn(8, 3, 14, 14)
    theirs = F.interpolate(weight, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(resize_projection(weight, (16, 16), method="bicubic"), theirs)
    with pytest.raises(ConfigError, match="pinv or bicubic, not 'area'"):
        resize_projection(weight, (16, 16), method="area")


def test_loading_takes_any_patch_when_told_how(tmp_path: Path) -> None:
    source = build_vit("tiny", depth=2, image_size=32, patch_size=8)
    write_safetensors(tmp_path / "x.safetensors", source.state_dict(), describe(source).to_metadata())
    vit = build_vit("tiny", depth=2, image_size=48, patch_size=12)
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.weight is 192x3x8x8"):
        load_backbone(vit, tmp_path / "x.safetensors")
    report = load_backbone(vit, tmp_path / "x.safetensors", patch_resize="pinv")
    assert report.resized == {"patch_embed.proj.weight": "192x3x8x8 -> 192x3x12x12"}
    expected = resize_projection(source.patch_embed.proj.weight, (12, 12), method="pinv")
    assert torch.equal(vit.patch_embed.proj.weight, expected)
