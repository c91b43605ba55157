"""Encoders that go without a token, and files of two encoders: read as their own model computes, or said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mae_transfer.checkpoint import hub, load_backbone, read_checkpoint
from mae_transfer.checkpoint.inspection import inspect
from mae_transfer.errors import CheckpointError
from mae_transfer.vit import build_vit
from tests.checkpoint.foreign import assert_equal, features, pictures, randomised, read

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 128, "depth": 2, "num_heads": 2}


def timms(name: str = "vit_tiny_patch16_224", seed: int = 0, **options: Any) -> Any:
    model = randomised(timm.create_model(name, **{**SMALL, **options}))
    with torch.no_grad():
        model.pos_embed += seed
    return model


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_gap_224", "vit_base_patch16_siglip_gap_224", "vit_medium_patch16_gap_256"]
)
def test_timms_models_without_a_cls_token(name: str, tmp_path: Path) -> None:
    theirs = timms(name)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    vit, checkpoint = read(tmp_path / "model.pth")
    assert (checkpoint.family, checkpoint.info.cls_token, vit.cls_token) == ("vit-gap", False, None)
    with torch.no_grad():
        assert_equal(features(vit, pictures(64, 64)), theirs.forward_features(pictures(64, 64)))


def test_a_lost_cls_token_is_missed(tmp_path: Path) -> None:
    tensors = timms().state_dict()
    del tensors["cls_token"]
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="positions, in a model without cls token, is 17, which is no square"):
        read_checkpoint(tmp_path / "model.pth")


def test_registers_without_a_cls_token_are_refused(tmp_path: Path) -> None:
    torch.save(timms("vit_medium_patch16_reg4_gap_256").state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="register tokens go with a cls token"):
        read_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("prefix", ["backbone.net.", "backbone."])
def test_a_host_without_the_cls_token_keeps_its_row(prefix: str, tmp_path: Path) -> None:
    """A segmenter's or detector's file: 17 rows for 16 patches, as before it lost the token."""
    ours = randomised(build_vit("tiny", image_size=64, depth=2, cls_token=False))
    torch.save({"state_dict": {prefix + name: value for name, value in ours.state_dict().items()}}, tmp_path / "a.pth")
    vit, checkpoint = read(tmp_path / "a.pth")
    assert checkpoint.family in ("detectron2", "mmseg")
    assert torch.equal(features(vit, pictures(64, 64)), features(ours, pictures(64, 64)))


def test_an_empty_tensor_of_registers_is_none(tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    numbers = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    theirs = randomised(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**numbers, num_register_tokens=0)))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_equal(features(read(tmp_path)[0], pictures(64, 64)), theirs(pictures(64, 64)).last_hidden_state)


def test_dinov2s_training_gives_the_teacher(tmp_path: Path) -> None:
    student, teacher = timms(init_values=1.0), timms(seed=1, init_values=1.0)
    state = {f"student.backbone.{name}": tensor for name, tensor in student.state_dict().items()}
    state |= {f"teacher.backbone.{name}": tensor for name, tensor in teacher.state_dict().items()}
    state |= {f"{which}.backbone.mask_token": torch.zeros(1, 128) for which in ("student", "teacher")}
    state["student.dino_head.last_layer.weight_v"] = torch.zeros(8, 8)
    torch.save({"model": state, "iteration": 3}, tmp_path / "model_0000003.rank_0.pth")
    vit, checkpoint = read(tmp_path / "model_0000003.rank_0.pth")
    with torch.no_grad():
        assert_equal(features(vit, pictures(64, 64)), teacher.forward_features(pictures(64, 64)))
    assert "student.backbone.pos_embed" in checkpoint.left_out
    del state["teacher.backbone.pos_embed"]
    torch.save({"model": state}, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "damaged.pth")


def test_another_activation_is_refused_where_the_config_says_it(tmp_path: Path) -> None:
    """SigLIP 2's, in the names and shapes of timm's other models without a cls token."""
    from timm.models import save_for_hf

    theirs = timms("vit_base_patch32_siglip_gap_256", patch_size=16)
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    with pytest.raises(CheckpointError, match=r"vit_base_patch32_siglip_gap_256 has the activation GELUTanh\(\)"):
        read_checkpoint(tmp_path)


def test_what_an_average_was_taken_of_is_said_to_be_left(tmp_path: Path) -> None:
    tensors = timms().state_dict()
    average = {name: 0.5 * tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": tensors, "state_dict_ema": average, "epoch": 3}, tmp_path / "last.pth.tar")
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert torch.equal(checkpoint.tensors["cls_token"], average["cls_token"])
    assert sorted(checkpoint.left_out) == sorted(f"state_dict.{name}" for name in tensors)
    assert f"state_dict.* ({len(tensors)})" in inspect(tmp_path / "last.pth.tar")


@pytest.mark.parametrize(
    ("name", "family", "license"),
    [
        ("eva_large_patch14_196", "vit", ""),
        ("vit_base_patch14_reg1_tipsv2", "vit", ""),
        ("vit_base_patch14_reg4_dinov2", "dinov2", "apache-2.0"),
    ],
)
def test_names_alone_are_no_licence(name: str, family: str, license: str, tmp_path: Path) -> None:
    tensors = timm.create_model(name, depth=1).state_dict()
    torch.save(tensors, tmp_path / "a.pth")
    info = read_checkpoint(tmp_path / "a.pth").info
    assert (info.family, info.license) == (family, license)


def test_a_config_of_another_model_is_another_licence(tmp_path: Path) -> None:
    from transformers import BeitConfig, BeitModel, Data2VecVisionConfig, Data2VecVisionModel

    numbers: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    numbers |= {"use_relative_position_bias": True}
    BeitModel(BeitConfig(**numbers)).save_pretrained(tmp_path / "beit")
    Data2VecVisionModel(Data2VecVisionConfig(**numbers)).save_pretrained(tmp_path / "data2vec")
    assert read_checkpoint(tmp_path / "beit").info.license == "mit"
    assert read_checkpoint(tmp_path / "data2vec").info.license == ""


@pytest.mark.parametrize("missing", ["fc_norm.weight", "fc_norm.bias"])
def test_half_a_norm_of_averaged_patches_is_missed(missing: str, tmp_path: Path) -> None:
    tensors = timms(global_pool="avg").state_dict()
    torch.save({name: tensor for name, tensor in tensors.items() if name != missing}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        read_checkpoint(tmp_path / "a.pth")


def test_heads_that_an_address_says_are_held_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(timms(num_heads=4).state_dict(), tmp_path / "a.pth")
    fetched = hub.Fetched(path=tmp_path / "a.pth", fields={"source": "timm/vit", "num_heads": 4})
    monkeypatch.setattr(hub, "fetch", lambda address: fetched)
    with pytest.raises(CheckpointError, match="attention has 4 heads, the model's 2"):
        load_backbone(build_vit("tiny", image_size=64, width=128, depth=2, num_heads=2), "timm/vit")
