"""Strict loading: what is explained passes with a report, everything else raises and changes nothing."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch

from mae_transfer import build_vit, load_backbone
from mae_transfer.checkpoint import (
    describe,
    encoder_state,
    image_statistics,
    read_checkpoint,
    write_safetensors,
    write_torch,
)
from mae_transfer.errors import CheckpointError
from mae_transfer.position import resize_pos_embed
from pretrain import MaskedAutoencoder, build_mae

SMALL = {"size": "tiny", "image_size": 32, "patch_size": 8, "depth": 4}


@pytest.fixture
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build_mae(**SMALL, decoder_depth=1)


@pytest.fixture
def official(tmp_path: Path, mae: MaskedAutoencoder) -> Path:
    """A training checkpoint of the released code: model, optimizer, epoch, and the pickled arguments."""
    path = tmp_path / "mae_pretrain.pth"
    args = argparse.Namespace(model="mae_vit_tiny_patch8", lr=1e-3)
    torch.save({"model": mae.state_dict(), "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}, path)
    return path


@pytest.fixture
def own(tmp_path: Path, mae: MaskedAutoencoder) -> Path:
    path = tmp_path / "encoder.safetensors"
    info = describe(mae, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), normalised_target=True, git_commit="abc")
    write_safetensors(path, encoder_state(mae.state_dict()), info.to_metadata())
    return path


def test_official_file_loads_completely_and_features_are_equal(official: Path, mae: MaskedAutoencoder) -> None:
    vit = build_vit(**SMALL)
    report = load_backbone(vit, official)
    assert report.family == "mae"
    assert not report.missing and not report.resized
    assert all(name.startswith(("decoder_", "mask_token")) for name in report.unexpected)
    assert set(report.loaded) == set(vit.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit.forward_features(images), mae.forward_features(images))
    assert "decoder_blocks.*.attn.qkv.weight" in str(report)


def test_own_file_carries_its_input_convention(own: Path) -> None:
    info = read_checkpoint(own).info
    assert (info.mean, info.std) == image_statistics(own) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (info.patch_size, info.image_size, info.num_heads, info.git_commit) == ((8, 8), (32, 32), 3, "abc")
    assert info.normalised_target is True
    assert info.family == "mae-transfer"


def test_a_run_folder_is_read_by_its_encoder(own: Path) -> None:
    assert load_backbone(build_vit(**SMALL), own.parent).source == str(own)


def test_positions_are_resized_to_the_host(own: Path, mae: MaskedAutoencoder) -> None:
    vit = build_vit(**{**SMALL, "image_size": (64, 48)}, cls_token=False, final_norm=False)
    report = load_backbone(vit, own)
    assert report.resized == {"pos_embed": "1x17x192 -> 1x49x192"}
    assert set(report.unexpected) == {"cls_token", "norm.weight", "norm.bias"}
    assert torch.equal(vit.pos_embed, resize_pos_embed(mae.pos_embed, (4, 4), (8, 6)))


def test_non_square_positions_are_read_with_their_own_grid(tmp_path: Path) -> None:
    mae = build_mae(**{**SMALL, "image_size": (16, 72)}, decoder_depth=1)  # 2 x 9 = 18 patches, no square
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, encoder_state(mae.state_dict()), describe(mae).to_metadata())
    vit = build_vit(**SMALL)
    load_backbone(vit, path)
    assert torch.equal(vit.pos_embed, resize_pos_embed(mae.pos_embed, (2, 9), (4, 4)))
    write_safetensors(path, encoder_state(mae.state_dict()), {})
    with pytest.raises(CheckpointError, match="no square grid, and the file has no metadata"):
        load_backbone(vit, path)


def test_what_transfer_adds_may_be_missing(own: Path) -> None:
    vit = build_vit(
        **SMALL, cls_token=False, window_size=2, global_blocks=(3,), relative_position="decomposed", layer_scale=1.0
    )
    report = load_backbone(vit, own)
    assert {name.split(".", 2)[2] for name in report.missing} == {
        "attn.rel_pos_h",
        "attn.rel_pos_w",
        "ls1.gamma",
        "ls2.gamma",
    }
    assert len(report.missing) == 16


@pytest.mark.parametrize("relative", ["bias", "decomposed"])
def test_relative_tables_are_resized(relative: str, tmp_path: Path) -> None:
    cls = relative == "bias"
    source = build_vit(**SMALL, relative_position=relative, cls_token=cls)
    for name, p in source.named_parameters():
        if "rel" in name:
            torch.nn.init.normal_(p)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, source.state_dict(), describe(source).to_metadata())
    target = build_vit(**{**SMALL, "image_size": 48}, relative_position=relative, cls_token=cls)
    report = load_backbone(target, path)
    assert len(report.resized) == 1 + 4 * (1 if relative == "bias" else 2)
    # The resized model at its own grid says what the source says when it resizes while running.
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(target(images), source(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.pop("blocks.2.mlp.fc1.weight"), "missing blocks.2.mlp.fc1.weight"),
        (lambda s: s.pop("norm.weight"), "missing norm.weight"),
        (
            lambda s: s.update({"blocks.4.norm1.weight": torch.ones(192)}),
            "is no whole encoder of 192 wide, 5 blocks: missing blocks.4.norm1.bias",
        ),
        (
            lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(64)}),
            "is a Vision Transformer with norms of queries and keys",
        ),
        (lambda s: s.update({"blocks.0.attn.gate.weight": torch.ones(64)}), "not of such a model blocks.0.attn.gate"),
        (
            lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.ones(7)}),
            "blocks.0.mlp.fc1.bias is (7,), expected (768,)",
        ),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.ones(192, 3, 16, 16)}),
            "patch_embed.proj.weight is 192x3x16x16",
        ),
    ],
)
def test_anything_unexplained_raises_and_changes_nothing(mae, tmp_path: Path, spoil, says: str) -> None:
    state = encoder_state(mae.state_dict())
    spoil(state)
    path = tmp_path / "spoilt.pth"
    write_torch(path, {"model": state})
    vit = build_vit(**SMALL)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_backbone(vit, path)
    assert says.replace("*", "") in str(error.value).replace("*", "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


class Innocent:
    """Stands for any object whose unpickling runs code."""

    def __reduce__(self):
        return (print, ("this pickle ran code",))


def test_unsafe_pickles_are_refused_and_not_run(tmp_path: Path, capsys) -> None:
    path = tmp_path / "unsafe.pth"
    torch.save({"model": {"pos_embed": torch.zeros(1)}, "extra": Innocent()}, path)
    with pytest.raises(CheckpointError, match=r"is refused.*convert it once where it was made"):
        read_checkpoint(path)
    assert "ran code" not in capsys.readouterr().out
    path.write_bytes(pickle.dumps(Innocent(), protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["official", "own"])
def test_truncated_files_are_named(name: str, request) -> None:
    path: Path = request.getfixturevalue(name)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoint(path)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(
        CheckpointError, match=r"holds 1 tensors of no known family \(conv1.weight\); expected a Vision Trans"
    ):
        read_checkpoint(path)
    torch.save({"epoch": 3, "notes": "empty"}, path)
    with pytest.raises(CheckpointError, match=r"found \['epoch', 'notes'\], expected tensors"):
        read_checkpoint(path)
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_checkpoint(tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"folder without encoder\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_file(own: Path) -> None:
    before = own.read_bytes()
    with pytest.raises(AttributeError):
        write_safetensors(own, {"x": None}, {})  # type: ignore[dict-item]
    assert own.read_bytes() == before
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_others_may_read_a_checkpoint_as_they_may_any_file(own: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("as the umask says")
    assert own.stat().st_mode == plain.stat().st_mode


def test_what_shapes_do_not_show_is_compared_too(own: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the file's attention has 3 heads, the model's 6"):
        load_backbone(build_vit(**SMALL, num_heads=6), own)
    rotary = {"absolute_positions": False, "rope_base": 100.0}
    vit = build_vit(**SMALL, **rotary)
    path = tmp_path / "rotary.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit).to_metadata())
    with pytest.raises(CheckpointError, match=r"rotary positions of base 100\.0, the model no rotary positions"):
        load_backbone(build_vit(**SMALL, absolute_positions=False), path)
    with pytest.raises(CheckpointError, match=r"base 100\.0, the model rotary positions of base 10\.0"):
        load_backbone(build_vit(**SMALL, absolute_positions=False, rope_base=10.0), path)


def test_the_licence_stands_in_the_report(official: Path, own: Path) -> None:
    assert "cc-by-nc-4.0" in str(load_backbone(build_vit(**SMALL), official))
    assert "  licence" not in str(load_backbone(build_vit(**SMALL), own))
