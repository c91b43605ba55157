"""What looks like a family and is not quite one: read as its own model computes, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mae_transfer.checkpoint import read_checkpoint, write_safetensors
from mae_transfer.checkpoint.convert import convert
from mae_transfer.errors import CheckpointError
from mae_transfer.position import sincos_2d
from mae_transfer.vit import build_vit
from tests.checkpoint.foreign import assert_equal, features, pictures, randomised, read

SMALL: dict[str, Any] = {"embed_dim": 128, "depth": 2, "num_heads": 2}


def timm_file(folder: Path, name: str, **options: Any) -> tuple[Path, Any]:
    model = randomised(timm.create_model(name, **{**SMALL, **options}))
    path = folder / "model.pth"
    torch.save(model.state_dict(), path)
    return path, model


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"])
def test_dinov3_with_biases_of_queries_and_values(name: str, tmp_path: Path) -> None:
    path, theirs = timm_file(tmp_path, name, img_size=64)
    assert any(parameter.endswith("q_bias") for parameter in theirs.state_dict())
    images = pictures(64, 64)
    with torch.no_grad():
        assert_equal(features(read(path)[0], images), theirs.forward_features(images))


@pytest.mark.parametrize("layout", ["base_encoder", "linear probe"])
def test_moco_v3_is_known_by_its_fixed_table(layout: str, tmp_path: Path) -> None:
    """``vit_small`` of the released code: 384 wide with twelve heads."""
    options = {"img_size": 64, "embed_dim": 384, "num_heads": 12}
    theirs = randomised(timm.create_model("vit_small_patch16_224", **{**SMALL, **options}))
    with torch.no_grad():
        theirs.pos_embed.copy_(moco_table(384, 4))
    prefix = {"base_encoder": "module.base_encoder.", "linear probe": "module."}[layout]
    path = tmp_path / "moco.pth.tar"
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in theirs.state_dict().items()}}, path)
    images = pictures(64, 64)
    vit, checkpoint = read(path)
    assert (checkpoint.family, checkpoint.info.num_heads, checkpoint.info.license) == ("moco-v3", 12, "cc-by-nc-4.0")
    with torch.no_grad():
        assert_equal(features(vit, images), theirs.forward_features(images))


def moco_table(width: int, side: int) -> Tensor:
    """As the released code builds it: the first half of the channels codes the row."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 4) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [position.flatten()[:, None] * frequency for position in (rows, columns)]
    table = torch.cat([part for half in halves for part in (half.sin(), half.cos())], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


def test_a_fixed_table_of_mae_is_not_moco_v3s() -> None:
    assert not torch.allclose(moco_table(128, 4), sincos_2d(128, (4, 4)), atol=1e-2)


def test_an_oblong_table_of_as_many_rows_as_a_square_is_refused(tmp_path: Path) -> None:
    path, _ = timm_file(tmp_path, "vit_tiny_patch16_224", img_size=(32, 64))  # 2 x 4 patches and cls: 3 x 3
    with pytest.raises(CheckpointError, match=r"9 rows, which are 3x3 patches without a cls row .* or 2x4 patches"):
        read_checkpoint(path)


def test_flexivit_is_read_where_its_config_says_so(tmp_path: Path) -> None:
    theirs = randomised(timm.create_model("flexivit_small", img_size=48, **SMALL))
    write_safetensors(tmp_path / "model.safetensors", theirs.state_dict(), {})
    (tmp_path / "config.json").write_text('{"architecture": "flexivit_small"}')
    images = pictures(48, 48)
    with torch.no_grad():
        assert_equal(features(read(tmp_path)[0], images), theirs.forward_features(images))


@pytest.mark.parametrize("missing", ["norm.weight", "norm.bias"])
def test_half_a_norm_of_dinov3s_is_missed(missing: str, tmp_path: Path) -> None:
    path, theirs = timm_file(tmp_path, "vit_small_patch16_dinov3", img_size=64)
    torch.save({name: tensor for name, tensor in theirs.state_dict().items() if name != missing}, path)
    with pytest.raises(CheckpointError, match=rf"missing {re.escape(missing)}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_small_r26_s32_224", r"not of such a model patch_embed\.backbone"),
        ("vit_small_patch16_rope_mixed_224", "rope"),
    ],
)
def test_what_the_encoder_has_no_place_for_is_refused(name: str, said: str, tmp_path: Path) -> None:
    path, _ = timm_file(tmp_path, name)
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "missing",
    ["blocks.1.attn.rel_pos_h", "blocks.0.attn.rel_pos_[hw]", r"blocks.3.mlp.fc1.weight", "blocks.2.norm1.bias"],
)
def test_an_encoder_inside_a_detector_is_whole(missing: str, tmp_path: Path) -> None:
    options = {"cls_token": False, "final_norm": False, "window_size": 2, "relative_position": "decomposed"}
    vit = build_vit("tiny", image_size=64, width=64, num_heads=2, depth=4, global_blocks=(1, 3), **options)
    tensors = {f"backbone.net.{name}": tensor for name, tensor in vit.state_dict().items()}
    torch.save({"model": tensors}, tmp_path / "whole.pth")
    assert read_checkpoint(tmp_path / "whole.pth").info.global_blocks == (1, 3)
    lacking = {name: tensor for name, tensor in tensors.items() if not re.search(missing, name)}
    assert lacking.keys() < tensors.keys()
    torch.save({"model": lacking}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="looks like an encoder inside detectron2, but is no whole encoder"):
        convert(tmp_path / "model.pth", tmp_path / "out.safetensors", "backbone")


def test_a_hugging_face_vit_of_another_activation_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, hidden_act="silu")
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="hidden_act 'silu'"):
        read_checkpoint(tmp_path)
