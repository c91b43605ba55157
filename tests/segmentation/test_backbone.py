"""MAEViT against MMSegmentation's MAE, and at the sizes where theirs fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from mmseg.models.backbones import MAE
from mmseg.models.backbones import VisionTransformer as TheirTransformer
from mmseg.registry import MODELS
from torch import Tensor

from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.errors import CheckpointError
from mae_transfer.segmentation import MAEViT
from mae_transfer.vit import build_vit
from tests.segmentation.conftest import their_name


def mmseg_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's state dict in the names of MMSegmentation's MAE."""
    return {their_name(f"backbone.{name}").removeprefix("backbone."): tensor for name, tensor in state.items()}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter, tables and layer scales included, a value that shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("crop", [64, 96])
def test_equals_mmsegs_mae_with_relative_position_bias(crop: int) -> None:
    ours = randomised(MAEViT("tiny", patch_size=16, image_size=crop, taps=(3, 5, 7, 11)))
    theirs = MAE(
        img_size=(crop, crop),
        patch_size=16,
        embed_dims=192,
        num_layers=12,
        num_heads=3,
        out_indices=[3, 5, 7, 11],
        init_values=1.0,
        norm_cfg={"type": "LN", "eps": 1e-6},
    )
    theirs.train(False)  # their eval() returns None
    report = theirs.load_state_dict(mmseg_keys(ours.state_dict()), strict=False)
    assert not report.unexpected_keys
    assert all(name.endswith("relative_position_index") for name in report.missing_keys)
    images = torch.randn(2, 3, crop, crop)
    with torch.no_grad():
        for mine, reference in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 48), (16, 16), (80, 64), (64, 130), (50, 33)])
def test_any_input_size_gives_maps_of_the_patch_stride(height: int, width: int) -> None:
    backbone = MAEViT("tiny", patch_size=16, image_size=64).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, height, width))
    assert [tuple(x.shape) for x in maps] == [(1, 192, -(-height // 16), -(-width // 16))] * 4


def test_padding_is_zeros_at_the_bottom_and_right() -> None:
    backbone = randomised(MAEViT("tiny", patch_size=16, image_size=64))
    images = torch.randn(1, 3, 50, 40)
    padded = torch.zeros(1, 3, 64, 48)
    padded[:, :, :50, :40] = images
    with torch.no_grad():
        for mine, reference in zip(backbone(images), backbone.forward_taps(padded, backbone.taps), strict=True):
            torch.testing.assert_close(mine, reference)


def test_recipe_of_beit_is_the_default() -> None:
    backbone = MAEViT("tiny", patch_size=16, image_size=64)
    names = dict(backbone.named_parameters())
    assert "blocks.0.attn.relative_position_bias_table" in names
    assert not names["blocks.0.attn.relative_position_bias_table"].any()
    assert names["blocks.0.attn.relative_position_bias_table"].shape == (7 * 7 + 3, 3)
    assert bool((names["blocks.11.ls2.gamma"] == 1).all())
    assert not any(name.startswith("norm.") for name in names)
    assert backbone.taps == (3, 5, 7, 11)


def test_registered_and_built_from_a_dictionary() -> None:
    with DefaultScope.overwrite_default_scope("mmseg"):
        backbone = MODELS.build({"type": "MAEViT", "size": "tiny", "image_size": [64, 96], "patch_size": 8})
    assert backbone.grid == (8, 12)


@pytest.mark.parametrize("official", [False, True])
def test_init_weights_loads_an_encoder_pretrained_at_another_size(tmp_path, official: bool) -> None:
    encoder = randomised(build_vit("tiny", patch_size=8, image_size=32))
    path = tmp_path / "encoder.safetensors"
    if official:  # {"model": …}, of which MMSegmentation's MAE loads nothing and says nothing
        path = tmp_path / "mae_pretrain.pth"
        torch.save({"model": encoder.state_dict()}, path)
    else:
        write_safetensors(path, encoder.state_dict(), describe(encoder).to_metadata())
    backbone = MAEViT("tiny", patch_size=8, image_size=64, init_checkpoint=str(path))
    backbone.init_weights()
    own = encoder.state_dict()
    for name, tensor in backbone.state_dict().items():
        if name == "pos_embed":
            torch.testing.assert_close(tensor[:, 0], own[name][:, 0])
        elif name in own:
            torch.testing.assert_close(tensor, own[name])
        else:
            assert "relative_position_bias_table" in name or ".ls" in name


def test_an_encoder_of_another_width_is_refused(tmp_path) -> None:
    encoder = build_vit("small", patch_size=8, image_size=32)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, encoder.state_dict(), describe(encoder).to_metadata())
    with pytest.raises(CheckpointError, match="shapes differ"):
        MAEViT("tiny", patch_size=8, image_size=64, init_checkpoint=str(path)).init_weights()


@pytest.mark.parametrize("size", [(32, 48), (96, 64)])
def test_another_size_equals_mmsegs_mae_made_for_it(size: tuple[int, int]) -> None:
    """Smaller, larger, and not square: positions resized by MMSegmentation's own function, tables head by head."""
    ours = randomised(MAEViT("tiny", patch_size=16, image_size=64, taps=(11,)))
    grid = (size[0] // 16, size[1] // 16)
    theirs = MAE(
        img_size=size,
        patch_size=16,
        embed_dims=192,
        num_layers=12,
        num_heads=3,
        out_indices=[11],
        init_values=1.0,
        norm_cfg={"type": "LN", "eps": 1e-6},
    )
    state = mmseg_keys(ours.state_dict())
    state["pos_embed"] = TheirTransformer.resize_pos_embed(state["pos_embed"], grid, (4, 4), "bicubic")
    for name, table in state.items():
        if name.endswith("relative_position_bias_table"):
            heads = [
                F.interpolate(
                    column[:-3].reshape(1, 1, 7, 7), size=(2 * grid[0] - 1, 2 * grid[1] - 1), mode="bicubic"
                ).flatten()
                for column in table.T
            ]
            state[name] = torch.cat([torch.stack(heads, dim=1), table[-3:]])
    theirs.load_state_dict(state, strict=False)
    theirs.train(False)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)[0], theirs(images)[0], atol=1e-4, rtol=1e-4)
