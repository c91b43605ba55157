"""What looks like a family and is not quite one: read as its own model computes, or refused by name."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from mae_transfer.checkpoint import describe, load_backbone, read_checkpoint, write_safetensors
from mae_transfer.checkpoint.convert import convert
from mae_transfer.checkpoint.formats import FORMATS
from mae_transfer.checkpoint.inspection import inspect
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


def test_a_folder_of_timms_says_its_mean_and_licence(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    name = "vit_tiny_patch16_224.augreg_in21k"
    save_for_hf(timm.create_model(name, pretrained=False, **SMALL), tmp_path, safe_serialization=True)
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.info.mean, checkpoint.info.license, checkpoint.has_metadata) == ((0.5,) * 3, "apache-2.0", True)


def test_a_folder_of_timms_says_its_heads(tmp_path: Path) -> None:
    """``test_vit`` is 64 wide with two heads; an encoder so wide would be taken to have one."""
    from timm.models import save_for_hf

    theirs = randomised(timm.create_model("test_vit", pretrained=False))
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    images = pictures(160, 160)
    vit, checkpoint = read(tmp_path)
    assert checkpoint.info.num_heads == 2
    with torch.no_grad():
        assert_equal(features(vit, images), theirs.forward_features(images))


def test_a_folder_of_timms_says_that_it_has_rotary_positions(tmp_path: Path) -> None:
    """Beside a table; the weights alone look like DeiT III's."""
    from timm.models import save_for_hf

    theirs = timm.create_model("vit_small_patch16_rope_ape_224", img_size=64, **SMALL)
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    with pytest.raises(CheckpointError, match="has rotary positions"):
        read_checkpoint(tmp_path)


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


def test_timms_models_without_biases_of_queries_keys_and_values(tmp_path: Path) -> None:
    path, theirs = timm_file(tmp_path, "vit_tiny_patch16_224", img_size=64, qkv_bias=False)
    images = pictures(64, 64)
    with torch.no_grad():
        assert_equal(features(read(path)[0], images), theirs.forward_features(images))


def test_timms_average_of_the_weights_is_what_is_read(tmp_path: Path) -> None:
    from timm.models import load_checkpoint as timm_loads

    raw = randomised(timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL))
    average = {name: 0.5 * tensor for name, tensor in raw.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": raw.state_dict(), "state_dict_ema": average}, tmp_path / "last.pth.tar")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL)
    timm_loads(theirs, str(tmp_path / "last.pth.tar"))
    ours = read_checkpoint(tmp_path / "last.pth.tar").tensors
    assert torch.equal(ours["blocks.1.attn.qkv.weight"], theirs.blocks[1].attn.qkv.weight)
    assert torch.equal(ours["cls_token"], average["cls_token"])


def test_dinov3_without_registers(tmp_path: Path) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    numbers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = randomised(DINOv3ViTModel(DINOv3ViTConfig(**numbers, image_size=64, num_register_tokens=0)))
    theirs.save_pretrained(tmp_path)
    images = pictures(64, 64)
    with torch.no_grad():
        assert_equal(features(read(tmp_path)[0], images), theirs(images).last_hidden_state)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_hugging_face_model_in_several_files(safe: bool, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64, intermediate_size=128)
    theirs = randomised(ViTModel(config, add_pooling_layer=False))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() and not (tmp_path / "model.safetensors").exists()
    if not safe:  # as older versions wrote them
        places = json.loads(index.read_text())
        for name in sorted(set(places["weight_map"].values())):
            torch.save(load_file(tmp_path / name), tmp_path / name.replace(".safetensors", ".bin"))
            (tmp_path / name).unlink()
        places["weight_map"] = {key: name.replace(".safetensors", ".bin") for key, name in places["weight_map"].items()}
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps(places))
    images = pictures(64, 64)
    vit, checkpoint = read(tmp_path)
    with torch.no_grad():
        assert_equal(features(vit, images), theirs(images).last_hidden_state)
    assert checkpoint.info.num_heads == 4 and "heads 4" in inspect(tmp_path)
    with pytest.raises(CheckpointError, match="attention has 4 heads, the model's 1"):
        load_backbone(build_vit("tiny", image_size=64, width=64, num_heads=1, depth=2, mlp_ratio=2.0), tmp_path)
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names {shard.name}, which is not beside it"):
        read_checkpoint(tmp_path)


def test_norms_of_another_epsilon_are_refused(tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=32, depth=2, norm_eps=1e-3)
    write_safetensors(tmp_path / "a.safetensors", vit.state_dict(), describe(vit).to_metadata())
    with pytest.raises(CheckpointError, match=r"epsilon of 0\.001, the model's 1e-06"):
        load_backbone(build_vit("tiny", image_size=32, depth=2), tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_loaded(value: float, tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=32, depth=2)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in before.items()}
    tensors["blocks.1.mlp.fc1.weight"][0, 0] = value
    write_safetensors(tmp_path / "a.safetensors", tensors, describe(vit).to_metadata())
    with pytest.raises(CheckpointError, match=r"blocks\.\*\.mlp\.fc1\.weight hold values that are no finite numbers"):
        load_backbone(vit, tmp_path / "a.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    report = inspect(tmp_path / "a.safetensors")
    assert report.count("no finite numbers") == 1 and report.count("no: its weights are broken") == 3 + len(FORMATS)
    with pytest.raises(CheckpointError, match="no finite numbers"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "backbone")
    assert not (tmp_path / "b.safetensors").exists()


def test_weights_that_are_whole_numbers_are_not_loaded(tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=32, depth=2)
    tensors = vit.state_dict() | {"blocks.0.mlp.fc1.weight": torch.ones(768, 192, dtype=torch.int8)}
    write_safetensors(tmp_path / "a.safetensors", tensors, describe(vit).to_metadata())
    with pytest.raises(CheckpointError, match=r"blocks\.\*\.mlp\.fc1\.weight hold int8, expected floating point"):
        load_backbone(vit, tmp_path / "a.safetensors")
    assert "fc1.weight hold int8" in inspect(tmp_path / "a.safetensors")


def test_metadata_of_others_may_speak_of_a_family(tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=32, depth=2)
    write_safetensors(tmp_path / "a.safetensors", vit.state_dict(), {"family": "resnet", "format": "pt"})
    assert read_checkpoint(tmp_path / "a.safetensors").family == "mae"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 3\n", "a pointer of Git LFS"),
        ("page", b"<!DOCTYPE html><html></html>", "is a web page"),
        ("nothing", b"", "is empty"),
        ("noise", bytes(range(1, 200)), "cannot be read"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".pkl"])
def test_files_in_a_checkpoints_place(name: str, content: bytes, said: str, ending: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}{ending}").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(tmp_path / f"{name}{ending}")


def test_what_a_refused_pickle_names(tmp_path: Path) -> None:
    tensors = build_vit("tiny", image_size=32, depth=1).state_dict()
    torch.save({"model": tensors, "args": Path("x")}, tmp_path / "path.pth")
    with pytest.raises(CheckpointError, match=r"is refused: it names pathlib\.\w*Path"):
        read_checkpoint(tmp_path / "path.pth")
    torch.save({"model": tensors}, tmp_path / "protocol.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"of a protocol other than torch\.save's own"):
        read_checkpoint(tmp_path / "protocol.pth")


def test_a_checkpoint_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": 1}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    for name, said in (("a.pth", "holds no state dict"), ("a.pkl", "holds itself")):
        with pytest.raises(CheckpointError, match=said):
            read_checkpoint(tmp_path / name)


def test_every_cut_through_a_legacy_file_is_an_error_of_ours(tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=16, width=16, num_heads=1, depth=1)
    path = tmp_path / "legacy.pth"
    torch.save({"model": vit.state_dict()}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert read_checkpoint(path).info.width == 16
    for length in range(1, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (1, 5, 7), (1, 1, 1, 1, 1), (2, 2)])
@pytest.mark.parametrize("family", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_tensors_of_any_shape_are_an_error_of_ours(
    family: str, shape: tuple[int, ...], tmp_path: Path, foreign_tensors: Any
) -> None:
    whole = foreign_tensors(family)
    for name in {"pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "cls_token"} & whole.keys():
        write_safetensors(tmp_path / "a.safetensors", {**whole, name: torch.zeros(shape)}, {})
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "a.safetensors")


@pytest.fixture(scope="module")
def foreign_tensors() -> Any:
    made: dict[str, dict[str, Tensor]] = {}

    def tensors(family: str) -> dict[str, Tensor]:
        if family not in made:
            made[family] = timm.create_model(family, img_size=32, **SMALL).state_dict()
        return made[family]

    return tensors


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": "4"},
        {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"image_size": {"height": 64}},
        {"image_mean": 0.5},
        {"image_mean": None},
        {"layer_norm_eps": True},
    ],
)
def test_a_config_of_wrong_types_is_an_error_of_ours(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    numbers = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    ViTModel(ViTConfig(**numbers)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | config))
    (key,) = config
    with pytest.raises(CheckpointError, match=rf"config\.json says {key}: .*; expected "):
        read_checkpoint(tmp_path)


def test_a_decoder_that_is_not_whole_is_not_exported(tmp_path: Path) -> None:
    from pretrain import build_mae

    mae = build_mae(size="tiny", image_size=32, patch_size=8, depth=2, decoder_depth=2)
    tensors = {name: tensor for name, tensor in mae.state_dict().items() if name != "decoder_embed.weight"}
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"the decoder lacks decoder_embed\.weight; --encoder-only"):
        convert(tmp_path / "mae.pth", tmp_path / "out", "hf")
    assert "the decoder lacks" in inspect(tmp_path / "mae.pth")
