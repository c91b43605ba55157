"""BEiT in each of its file layouts: features are those of timm and transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_transfer.checkpoint import write_safetensors
from tests.checkpoint.foreign import (
    assert_equal,
    cut,
    features,
    pictures,
    randomised,
    read,
    refusal,
    saved,
    truncated,
    without,
)

SIDE = 64  # 4 x 4 patches
TABLE = "relative_position_bias_table"


def timm_beit(**options: Any) -> Any:
    """timm's class, which kept the official names."""
    from timm.models.beit import Beit

    numbers = {"img_size": SIDE, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2, "init_values": 0.1}
    return randomised(Beit(**numbers, use_abs_pos_emb=False, **options))


def official(model: Any) -> dict[str, Tensor]:
    """With the index that the official code saves and timm does not."""
    tensors = dict(model.state_dict())
    index = torch.zeros(17, 17, dtype=torch.int64)
    for name in [name for name in tensors if name.endswith(TABLE)]:
        tensors[name.replace(TABLE, "relative_position_index")] = index
    return tensors


@torch.no_grad()
def expected(model: Any, images: Tensor) -> Tensor:
    return model.forward_features(images)


def test_official_pretraining_file_shares_one_table(tmp_path: Path) -> None:
    model = timm_beit(use_shared_rel_pos_bias=True, global_pool="token")
    tensors = {name: tensor for name, tensor in official(model).items() if not name.startswith("head.")}
    tensors |= {"mask_token": torch.zeros(1, 1, 128), "lm_head.weight": torch.zeros(8, 128)}
    tensors |= {"lm_head.bias": torch.zeros(8), "cls_pt_layers.0.norm1.weight": torch.zeros(128)}  # v2 has these
    path = tmp_path / "beitv2_base_patch16_224_pt1k.pth"
    torch.save({"model": tensors, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, path)
    vit, checkpoint = read(path)
    assert (checkpoint.family, checkpoint.info.license, checkpoint.info.mean) == ("beit", "mit", (0.5, 0.5, 0.5))
    assert checkpoint.info.image_size == (SIDE, SIDE) and not checkpoint.info.absolute_positions
    assert {"mask_token", "lm_head.weight", "cls_pt_layers.0.norm1.weight"} <= set(checkpoint.left_out)
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


def test_official_finetuned_file_has_a_table_a_block_and_no_norm(tmp_path: Path) -> None:
    model = timm_beit(use_rel_pos_bias=True)
    torch.save({"model": official(model)}, tmp_path / "beit_base_patch16_224_pt22k_ft22kto1k.pth")
    vit, checkpoint = read(tmp_path / "beit_base_patch16_224_pt22k_ft22kto1k.pth")
    assert not checkpoint.info.final_norm and {"fc_norm.weight", "head.weight"} <= set(checkpoint.tensors)
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


def test_timm_file(tmp_path: Path) -> None:
    import timm

    name = "beitv2_base_patch16_224"
    model = randomised(timm.create_model(name, img_size=SIDE, embed_dim=128, depth=2, num_heads=2, init_values=0.1))
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), {})
    vit, _ = read(tmp_path / "model.safetensors")
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


def huggingface(*, shared: bool) -> Any:
    from transformers import BeitConfig, BeitModel

    numbers = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE}
    numbers |= {"patch_size": 16, "intermediate_size": 256, "use_mean_pooling": not shared}
    numbers |= {"use_shared_relative_position_bias": shared, "use_relative_position_bias": not shared}
    return randomised(BeitModel(BeitConfig(**numbers)))


@pytest.mark.parametrize("shared", [True, False], ids=["pretrained", "finetuned"])
def test_hugging_face_folder(shared: bool, tmp_path: Path) -> None:
    model = huggingface(shared=shared)
    model.save_pretrained(tmp_path)
    vit, checkpoint = read(tmp_path)
    assert checkpoint.family == "hf-beit" and checkpoint.info.norm_eps == 1e-12
    with torch.no_grad():
        theirs = model(pictures(SIDE, SIDE)).last_hidden_state
    assert_equal(features(vit, pictures(SIDE, SIDE)), theirs)


def test_taps_are_those_of_timm(tmp_path: Path) -> None:
    model = timm_beit(use_rel_pos_bias=True)
    torch.save({"model": official(model)}, tmp_path / "beit.pth")
    vit, _ = read(tmp_path / "beit.pth")
    with torch.no_grad():
        taps = vit.forward_taps(pictures(SIDE, SIDE), [0, 1])
        theirs = model.forward_intermediates(pictures(SIDE, SIDE), indices=[0, 1], intermediates_only=True)
    for ours, other in zip(taps, theirs, strict=True):
        assert_equal(ours, other)


def test_damaged_files(tmp_path: Path) -> None:
    tensors = dict(timm_beit(use_rel_pos_bias=True).state_dict())
    assert "blocks.1.attn.v_bias is missing" in refusal(tmp_path, tensors, without("blocks.1.attn.v_bias"))
    said = refusal(tmp_path, tensors, without(f"blocks.1.attn.{TABLE}"))
    assert "looks like BEiT" in said and f"missing blocks.1.attn.{TABLE}" in said
    assert "no square grid" in refusal(tmp_path, tensors, cut(f"blocks.0.attn.{TABLE}"))
    said = refusal(tmp_path, tensors, cut("blocks.1.attn.v_bias"))
    assert "blocks.1.attn.qkv.bias is (320,), expected (384,)" in said
    torch.save({"model": tensors}, tmp_path / "half.pth")
    assert "damaged" in truncated(tmp_path / "half.pth")
    said = refusal(tmp_path, saved(huggingface(shared=True)), without("encoder.layer.1.attention.attention.key.weight"))
    assert "queries, keys and values of blocks.1.attn" in said
