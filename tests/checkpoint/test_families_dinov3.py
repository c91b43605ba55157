"""DINOv3 in each of its file layouts: features are those of transformers and timm."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_transfer.checkpoint import write_safetensors
from mae_transfer.errors import CheckpointError
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

SIDE = 64
# Hugging Face's names to those of facebookresearch/dinov3.
OFFICIAL = [
    (r"^embeddings\.register_tokens", "storage_tokens"),
    (r"^embeddings\.patch_embeddings", "patch_embed.proj"),
    (r"^embeddings\.", ""),
    (r"^layer\.", "blocks."),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.", "attn."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"mlp\.gate_proj", "mlp.w1"),
    (r"mlp\.up_proj", "mlp.w2"),
    (r"mlp\.down_proj", "mlp.w3"),
]
PLAIN_MLP = [(r"mlp\.w2", "mlp.fc1"), (r"mlp\.w3", "mlp.fc2")]


@cache
def huggingface(*, gated: bool = False, num_heads: int = 2) -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    numbers: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "image_size": SIDE,
    }
    numbers |= {"patch_size": 16, "intermediate_size": 256, "num_register_tokens": 4, "use_gated_mlp": gated}
    numbers["hidden_act"] = "silu" if gated else "gelu"
    return randomised(DINOv3ViTModel(DINOv3ViTConfig(**numbers)))


@torch.no_grad()
def expected(model: Any, images: Tensor) -> Tensor:
    return model(images).last_hidden_state


def official(model: Any) -> dict[str, Tensor]:
    """With the mask that keys' bias is multiplied by (the bias itself is whatever it was), and the periods in bf16."""
    names = renamed(saved(model), OFFICIAL)
    if not any(".mlp.w1." in name for name in names):
        names = renamed(names, PLAIN_MLP)
    tensors = packed(names, ("q_proj", "k_proj", "v_proj"), "qkv")
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        mask = torch.ones(384)
        mask[128:256] = 0
        tensors[f"{name}_mask"] = mask
        tensors[name][128:256] = math.nan
    head_dim = 128 // model.config.num_attention_heads
    periods = 100.0 ** (2 * torch.arange(head_dim // 4) / (head_dim // 2))
    return tensors | {"rope_embed.periods": periods.bfloat16()}


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "gated"])
def test_hugging_face_folder(gated: bool, tmp_path: Path) -> None:
    model = huggingface(gated=gated)
    model.save_pretrained(tmp_path)
    vit, checkpoint = read(tmp_path)
    assert (checkpoint.family, checkpoint.info.ffn) == ("hf-dinov3", "swiglu" if gated else "mlp")
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


@pytest.mark.parametrize("variant", [{}, {"gated": True}, {"num_heads": 4}], ids=["mlp", "gated", "narrow heads"])
def test_official_file(variant: dict[str, Any], tmp_path: Path) -> None:
    model = huggingface(**variant)
    torch.save(official(model), tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    vit, checkpoint = read(tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    info = checkpoint.info
    assert (checkpoint.family, info.rope_base, info.num_registers) == ("dinov3", 100.0, 4)
    assert (info.num_heads, info.absolute_positions) == (model.config.num_attention_heads, False)
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"])
def test_timm_file(name: str, tmp_path: Path) -> None:
    import timm

    model = randomised(timm.create_model(name, embed_dim=128, depth=2, num_heads=2, img_size=SIDE))
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), {})
    vit, _ = read(tmp_path / "model.safetensors")
    for size in ((SIDE, SIDE), (48, 80)):
        with torch.no_grad():
            theirs = model.forward_features(pictures(*size))
        assert_equal(features(vit, pictures(*size)), theirs)


def test_any_size_one_after_the_other(tmp_path: Path) -> None:
    """Rotary positions follow the grid that is seen, in training too after evaluation without gradients."""
    model = huggingface()
    torch.save(official(model), tmp_path / "dinov3.pth")
    vit, _ = read(tmp_path / "dinov3.pth")
    with torch.inference_mode():
        vit.forward_features(pictures(96, 48))
    for size in ((96, 48), (48, 96), (SIDE, SIDE)):
        seen = vit.forward_features(pictures(*size))
        assert_equal(seen.detach(), expected(model, pictures(*size)))
        seen.sum().backward()
    with torch.no_grad():
        (tap,) = vit.forward_taps(pictures(48, 96), [0])
        theirs = model(pictures(48, 96), output_hidden_states=True).hidden_states[1][:, 5:]
    assert_equal(tap, theirs.transpose(1, 2).reshape(2, 128, 3, 6))


def test_published_sizes_have_their_heads(tmp_path: Path) -> None:
    """ViT-H+ has 20 heads, not the 16 of MAE's huge; the 7B's are 128 wide. Neither is said in timm's names."""
    for width, heads in ((384, 6), (1280, 20), (4096, 32)):
        tensors = {"cls_token": torch.zeros(1, 1, width), "reg_token": torch.zeros(1, 4, width)}
        tensors |= {"patch_embed.proj.weight": torch.zeros(width, 3, 2, 2), "patch_embed.proj.bias": torch.zeros(width)}
        tensors |= {f"norm.{part}": torch.zeros(width) for part in ("weight", "bias")}
        block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (8, width)}
        block["mlp.fc2"] = (width, 8)
        for name, shape in block.items():
            tensors[f"blocks.0.{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
            tensors[f"blocks.0.{name}.bias"] = torch.zeros(shape[0])
        for name in ("norm1", "norm2"):
            tensors |= {f"blocks.0.{name}.{part}": torch.zeros(width) for part in ("weight", "bias")}
        tensors |= {"blocks.0.gamma_1": torch.ones(width), "blocks.0.gamma_2": torch.ones(width)}
        del tensors["blocks.0.attn.qkv.bias"]
        write_safetensors(tmp_path / "model.safetensors", tensors, {})
        assert read(tmp_path / "model.safetensors")[1].info.num_heads == heads


def test_damaged_files(tmp_path: Path) -> None:
    tensors = official(huggingface())
    said = refusal(tmp_path, tensors, without("blocks.1.attn.proj.weight"))
    assert "looks like DINOv3" in said and "missing blocks.1.attn.proj.weight" in said
    said = refusal(tmp_path, tensors, cut("blocks.1.mlp.fc1.bias"))
    assert "blocks.1.mlp.fc1.bias is (128,), expected (256,)" in said
    other = {"rope_embed.periods": 10_000.0 ** torch.linspace(0, 1, 17)[:-1]}
    said = refusal(tmp_path, tensors, lambda broken: broken.update(other))
    assert "rope_embed.periods" in said and "base 100" in said
    torch.save(tensors, tmp_path / "half.pth")
    assert "damaged" in truncated(tmp_path / "half.pth")
    said = refusal(tmp_path, saved(huggingface()), without("layer.1.attention.k_proj.weight"))
    assert "queries, keys and values of blocks.1.attn" in said


def test_a_gate_s_activation_without_a_gate_is_refused(tmp_path: Path) -> None:
    huggingface().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "silu"'))
    with pytest.raises(CheckpointError, match=r"hidden_act is 'silu'; .* 'gelu'"):
        read(tmp_path)
