"""DINOv2 in each of its file layouts: features are those of transformers and timm."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_transfer.checkpoint import write_safetensors
from mae_transfer.checkpoint.info import IMAGENET_MEAN
from tests.checkpoint.foreign import (
    assert_equal,
    cut,
    features,
    packed,
    pictures,
    randomised,
    read,
    refusal,
    renamed,
    saved,
    truncated,
    without,
)

SIDE = 56  # 4 x 4 patches
# Hugging Face's names to those of facebookresearch/dinov2.
OFFICIAL = [
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.output\.dense", "attn.proj"),
    (r"attention\.attention\.", "attn."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in", "mlp.w12"),
    (r"mlp\.weights_out", "mlp.w3"),
    (r"^layernorm", "norm"),
]


@cache
def huggingface(*, registers: int = 0, gated: bool = False) -> Any:
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    numbers = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE}
    numbers |= {"patch_size": 14, "use_swiglu_ffn": gated}
    if registers:
        config = Dinov2WithRegistersConfig(**numbers, num_register_tokens=registers)
        return randomised(Dinov2WithRegistersModel(config))
    return randomised(Dinov2Model(Dinov2Config(**numbers)))


@torch.no_grad()
def expected(model: Any, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


def official(model: Any) -> dict[str, Tensor]:
    names = renamed(saved(model), OFFICIAL)
    return packed(names, ("query", "key", "value"), "qkv")


VARIANTS = [{}, {"registers": 4}, {"registers": 4, "gated": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "registers", "giant"])
def test_hugging_face_folder(variant: dict[str, Any], tmp_path: Path) -> None:
    model = huggingface(**variant)
    model.save_pretrained(tmp_path)
    vit, checkpoint = read(tmp_path)
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))
    info = checkpoint.info
    assert (checkpoint.family, info.license, info.mean) == ("hf-dinov2", "apache-2.0", IMAGENET_MEAN)
    assert (info.patch_size, info.num_registers, info.layer_scale) == ((14, 14), variant.get("registers", 0), True)
    assert info.ffn == ("swiglu" if variant.get("gated") else "mlp")


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "registers", "giant"])
def test_official_file(variant: dict[str, Any], tmp_path: Path) -> None:
    model = huggingface(**variant)
    torch.save(official(model), tmp_path / "dinov2_vits14_pretrain.pth")
    vit, checkpoint = read(tmp_path / "dinov2_vits14_pretrain.pth")
    assert checkpoint.family == "dinov2" and checkpoint.info.license == "apache-2.0"
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


def test_official_training_file_with_blocks_in_chunks(tmp_path: Path) -> None:
    """``teacher_checkpoint.pth``: the backbone beside its head, blocks in two chunks under their running numbers."""
    model = huggingface(registers=4)
    tensors = {
        f"backbone.{name.replace('blocks.', 'blocks.0.').replace('blocks.0.1.', 'blocks.1.1.')}": tensor
        for name, tensor in official(model).items()
    }
    tensors |= {"dino_head.mlp.0.weight": torch.zeros(4, 128), "ibot_head.mlp.0.weight": torch.zeros(4, 128)}
    torch.save({"teacher": tensors}, tmp_path / "teacher_checkpoint.pth")
    vit, checkpoint = read(tmp_path / "teacher_checkpoint.pth")
    assert checkpoint.family == "dinov2"
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 2.66667 * 2}),
    ],
)
def test_timm_file(name: str, numbers: dict[str, Any], tmp_path: Path) -> None:
    import timm

    model = randomised(timm.create_model(name, img_size=SIDE, embed_dim=128, depth=2, num_heads=2, **numbers))
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), {})
    vit, _ = read(tmp_path / "model.safetensors")
    with torch.no_grad():
        theirs = model.forward_features(pictures(SIDE, SIDE))
    assert_equal(features(vit, pictures(SIDE, SIDE)), theirs)


def test_another_size_resizes_positions_as_hugging_face(tmp_path: Path) -> None:
    model = huggingface()  # its class with registers smooths what it resizes
    torch.save(official(model), tmp_path / "dinov2.pth")
    vit, _ = read(tmp_path / "dinov2.pth")
    assert_equal(features(vit, pictures(70, 84)), expected(model, pictures(70, 84)))


def test_taps_drop_registers(tmp_path: Path) -> None:
    model = huggingface(registers=4)
    torch.save(official(model), tmp_path / "dinov2.pth")
    vit, _ = read(tmp_path / "dinov2.pth")
    with torch.no_grad():
        (tap,) = vit.forward_taps(pictures(SIDE, SIDE), [0])
        theirs = model(pictures(SIDE, SIDE), output_hidden_states=True).hidden_states[1][:, 5:]
    assert_equal(tap, theirs.transpose(1, 2).reshape(2, 128, 4, 4))


def test_damaged_files(tmp_path: Path) -> None:
    tensors = official(huggingface(registers=4))
    said = refusal(tmp_path, tensors, without("blocks.1.attn.qkv.weight"))
    assert "looks like DINOv2" in said and "missing blocks.1.attn.qkv.weight" in said
    said = refusal(tmp_path, tensors, cut("blocks.1.ls2.gamma"))
    assert "blocks.1.ls2.gamma is (64,), expected (128,)" in said
    torch.save(tensors, tmp_path / "half.pth")
    assert "damaged" in truncated(tmp_path / "half.pth")
    said = refusal(tmp_path, tensors, without("patch_embed.proj.weight"))
    assert "no known family" in said and "nearest is DINOv2" in said and "proj" in said
