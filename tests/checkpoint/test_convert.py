"""Conversion there and back is identity; hosts read what was written for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from mae_transfer.checkpoint import describe, read_checkpoint, write_safetensors
from mae_transfer.checkpoint.convert import FORMATS, convert, inspect, main
from mae_transfer.errors import CheckpointError, run_tool
from pretrain import MaskedAutoencoder, build_mae

ENDING = {"backbone": ".safetensors", "mae": ".pth", "timm": ".safetensors", "detectron2": ".pth", "mmseg": ".pth"}


@pytest.fixture
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build_mae(size="tiny", image_size=(32, 48), patch_size=8, depth=2, decoder_depth=1)


@pytest.fixture
def source(tmp_path: Path, mae: MaskedAutoencoder) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, mae.state_dict(), describe(mae, mean=(0.1, 0.2, 0.3)).to_metadata())
    return path


@pytest.mark.parametrize("to", list(FORMATS))
def test_round_trip_is_identity(to: str, source: Path, tmp_path: Path) -> None:
    there, back = tmp_path / f"there{ENDING[to]}", tmp_path / "back.safetensors"
    convert(source, there, to)
    convert(there, back, "backbone")
    direct = tmp_path / "direct.safetensors"
    convert(source, direct, "backbone")
    first, second = read_checkpoint(direct), read_checkpoint(back)
    assert first.info == second.info
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_official_file_keeps_the_decoder(source: Path, mae: MaskedAutoencoder, tmp_path: Path) -> None:
    convert(source, tmp_path / "official.pth", "mae")
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    mae.load_state_dict(content["model"], strict=True)


def test_host_formats_have_the_hosts_names(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "d2.pth", "detectron2")
    names = torch.load(tmp_path / "d2.pth", weights_only=True)["model"]
    assert all(name.startswith("backbone.net.") for name in names)
    convert(source, tmp_path / "mm.pth", "mmseg")
    names = torch.load(tmp_path / "mm.pth", weights_only=True)["state_dict"]
    assert all(name.startswith("backbone.") and not name.startswith("backbone.net.") for name in names)


def test_timm_reads_its_format_and_says_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    mae = build_mae(size="tiny", image_size=32, patch_size=8, decoder_depth=1)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, mae.state_dict(), describe(mae).to_metadata())
    convert(path, tmp_path / "timm.safetensors", "timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, global_pool="")
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs.eval().forward_features(images), mae.forward_features(images), rtol=0, atol=1e-4)


def test_inspect_says_what_is_inside(source: Path) -> None:
    text = inspect(source)
    for part in (
        "mae-transfer",
        "width 192, depth 2, heads 3",
        "8x8 px",
        "32x48 px",
        "1x25x192",
        "decoder_pred.weight",
        "sha256",
    ):
        assert part in text


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "there.safetensors"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is left as it is"):
        convert(source, target, "backbone")
    assert target.read_text() == "mine"
    convert(source, target, "backbone", overwrite=True)
    assert read_checkpoint(target).family == "mae-transfer"


def test_bad_input_is_one_line_and_status_2(source: Path, tmp_path: Path, capsys) -> None:
    assert run_tool(main, [str(tmp_path / "nowhere.pth"), str(tmp_path / "x.safetensors"), "--to", "backbone"]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint ")
    assert run_tool(main, [str(source), str(tmp_path / "x.pth"), "--to", "backbone"]) == 2
    assert "should end in .safetensors" in capsys.readouterr().err


def test_the_tool_runs(source: Path, tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
    done = subprocess.run(
        [sys.executable, str(tool), str(source), str(tmp_path / "out.pth"), "--to", "mae"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "-> " in done.stdout, done.stderr
