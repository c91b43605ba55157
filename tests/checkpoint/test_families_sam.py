"""SAM's image encoder in each of its file layouts, and ViTDet's: features are those of the families' own classes."""

from __future__ import annotations

import pickle
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
    renamed,
    saved,
    truncated,
    without,
)

SIDE = 80  # 5 x 5 patches: windows of 3 do not divide it
NUMBERS = {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 16, "window_size": 3}
# Hugging Face's names to those of facebookresearch/segment-anything.
OFFICIAL = [
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.layers\.", ".blocks."),
    (r"(blocks\.\d+\.)layer_norm", r"\1norm"),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import SamVisionConfig, SamVisionModel

    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "mlp_dim": 256, "output_channels": 8}
    return randomised(SamVisionModel(SamVisionConfig(**NUMBERS, **sizes, global_attn_indexes=[1])))


@torch.no_grad()
def expected(model: Any, images: Tensor) -> Tensor:
    """Before the neck, as (N, L, D)."""
    return model(images, output_hidden_states=True).hidden_states[-1].flatten(1, 2)


def official(model: Any) -> dict[str, Tensor]:
    others = {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.zeros(2, 4)}
    return renamed(saved(model), OFFICIAL) | others | {"mask_decoder.iou_token.weight": torch.zeros(1, 8)}


def test_official_file(model: Any, tmp_path: Path) -> None:
    torch.save(official(model), tmp_path / "sam_vit_b_01ec64.pth")
    vit, checkpoint = read(tmp_path / "sam_vit_b_01ec64.pth")
    info = checkpoint.info
    assert (checkpoint.family, info.license) == ("sam", "apache-2.0")
    assert (info.window_size, info.global_blocks, info.image_size) == (3, (1,), (SIDE, SIDE))
    assert not info.cls_token and not info.final_norm
    assert "mask_decoder.iou_token.weight" in checkpoint.left_out
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))
    with torch.no_grad():
        (tap,) = vit.forward_taps(pictures(SIDE, SIDE), [2])
    assert_equal(tap.flatten(2).transpose(1, 2), expected(model, pictures(SIDE, SIDE)))


def test_hugging_face_folder(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    vit, checkpoint = read(tmp_path)
    assert checkpoint.family == "hf-sam"
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(model, pictures(SIDE, SIDE)))


def test_hugging_face_folder_of_the_whole_model(tmp_path: Path) -> None:
    """``config.json`` says the encoder's numbers below ``vision_config``; heads are not 64 wide here."""
    from transformers import SamConfig, SamModel

    parts: dict[str, dict[str, Any]] = {
        "vision_config": NUMBERS
        | {"hidden_size": 96, "num_hidden_layers": 2, "global_attn_indexes": [0], "mlp_dim": 96},
        "prompt_encoder_config": {"hidden_size": 8, "mask_input_channels": 4, "image_size": SIDE},
        "mask_decoder_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_dim": 8},
    }
    parts["vision_config"]["output_channels"] = 8
    parts["mask_decoder_config"]["iou_head_hidden_dim"] = 8
    whole = randomised(SamModel(SamConfig(**parts)))
    whole.save_pretrained(tmp_path)
    vit, checkpoint = read(tmp_path)
    assert (checkpoint.info.num_heads, checkpoint.info.mlp_ratio) == (2, 1.0)
    assert_equal(features(vit, pictures(SIDE, SIDE)), expected(whole.vision_encoder, pictures(SIDE, SIDE)))


def test_timm_file(tmp_path: Path) -> None:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    model = randomised(
        VisionTransformerSAM(
            img_size=SIDE,
            embed_dim=128,
            depth=3,
            num_heads=2,
            window_size=3,
            global_attn_indexes=(1,),
            use_rel_pos=True,
            neck_chans=8,
        )
    )
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), {})
    vit, checkpoint = read(tmp_path / "model.safetensors")
    assert checkpoint.family == "sam"
    model.neck = torch.nn.Identity()
    with torch.no_grad():
        theirs = model.forward_features(pictures(SIDE, SIDE))  # (N, D, h, w)
    assert_equal(features(vit, pictures(SIDE, SIDE)), theirs.flatten(2).transpose(1, 2))


def test_damaged_files(model: Any, tmp_path: Path) -> None:
    tensors = official(model)
    said = refusal(tmp_path, tensors, without("image_encoder.blocks.2.attn.rel_pos_w"))
    assert "looks like SAM" in said and "missing blocks.2.attn.rel_pos_w" in said
    said = refusal(tmp_path, tensors, cut("image_encoder.blocks.2.mlp.lin1.weight"))
    assert "blocks.2.mlp.fc1.weight is (128, 128), expected (256, 128)" in said
    said = refusal(tmp_path, tensors, cut("image_encoder.blocks.2.attn.rel_pos_h"))
    assert "windows of several sides" in said
    said = refusal(tmp_path, tensors, without("image_encoder.pos_embed"))
    assert "nearest is SAM" in said and "pos_embed" in said
    torch.save(tensors, tmp_path / "half.pth")
    assert "damaged" in truncated(tmp_path / "half.pth")


def test_detectron2_release_of_vitdet(tmp_path: Path) -> None:
    """``model_final_*.pkl``: numpy arrays, the encoder below ``backbone.net.``, positions with a cls row."""
    backbones = pytest.importorskip("detectron2.modeling.backbone.vit", reason="needs Detectron2")
    model = randomised(
        backbones.ViT(
            img_size=SIDE,
            pretrain_img_size=SIDE,
            embed_dim=128,
            depth=3,
            num_heads=2,
            drop_path_rate=0.0,
            window_size=3,
            window_block_indexes=[0, 2],
            use_rel_pos=True,
            out_feature="last",
        )
    )
    arrays = {f"backbone.net.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays["roi_heads.box_head.fc1.weight"] = torch.zeros(4, 4).numpy()
    with (tmp_path / "model_final_61ccd1.pkl").open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "ViTDet"}, file)
    vit, checkpoint = read(tmp_path / "model_final_61ccd1.pkl")
    assert checkpoint.family == "detectron2"
    assert (checkpoint.info.window_size, checkpoint.info.global_blocks) == (3, (1,))
    with torch.no_grad():
        theirs = model(pictures(SIDE, SIDE))["last"]  # (N, D, h, w)
    assert_equal(features(vit, pictures(SIDE, SIDE)), theirs.flatten(2).transpose(1, 2))
