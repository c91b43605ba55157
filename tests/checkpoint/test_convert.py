"""Conversion there and back is identity; the tool says what it did, and what it will not do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_transfer import build_vit
from mae_transfer.checkpoint import describe, encoder_state, read_checkpoint, write_safetensors
from mae_transfer.checkpoint.convert import convert, main
from mae_transfer.checkpoint.formats import FORMATS
from mae_transfer.checkpoint.inspection import examine, inspect
from mae_transfer.checkpoint.resize import resize_projection
from mae_transfer.errors import CheckpointError, ConfigError, run_tool
from mae_transfer.position import resize_pos_embed
from pretrain import MaskedAutoencoder, build_mae

SMALL = {"width": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
MAE = {**SMALL, "decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 2}
ENDING = {name: format.endings[0] if format.endings else "" for name, format in FORMATS.items()}


@pytest.fixture
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build_mae(size="tiny", image_size=(32, 48), **MAE)


@pytest.fixture
def source(tmp_path: Path, mae: MaskedAutoencoder) -> Path:
    return _write(tmp_path, "model.safetensors", mae)


def _write(folder: Path, name: str, model: torch.nn.Module) -> Path:
    """A file of ours with weights that all matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = folder / name
    write_safetensors(path, model.state_dict(), describe(model, mean=(0.1, 0.2, 0.3), license="mit").to_metadata())
    return path


def _sources(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    square = build_mae(size="tiny", image_size=32, **MAE)
    oblong = build_vit("tiny", image_size=(32, 48), **SMALL)
    foreign = build_vit(
        "tiny", image_size=32, **SMALL, num_registers=2, layer_scale=1.0, ffn="swiglu", mlp_ratio=2.0, norm_eps=1e-5
    )
    windows = build_vit(
        "tiny",
        **{**SMALL, "depth": 4},
        image_size=32,
        cls_token=False,
        final_norm=False,
        window_size=2,
        global_blocks=(3,),
        relative_position="decomposed",
    )
    beit = build_vit("tiny", image_size=32, **SMALL, layer_scale=1.0, relative_position="bias")
    tuned = build_vit("tiny", image_size=32, **SMALL).state_dict()
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in tuned.items()}
    tuned |= {"head.weight": torch.randn(5, 48), "head.bias": torch.randn(5)}
    torch.save({"model": tuned}, folder / "tuned.pth")
    torch.save({"model": square.state_dict(), "epoch": 3}, folder / "official.pth")
    return {
        "official": folder / "official.pth",
        "square": _write(folder, "square.safetensors", square),
        "oblong": _write(folder, "oblong.safetensors", oblong),
        "tuned": folder / "tuned.pth",
        "registers": _write(folder, "registers.safetensors", foreign),
        "windows": _write(folder, "windows.safetensors", windows),
        "beit": _write(folder, "beit.safetensors", beit),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _sources(tmp_path_factory.mktemp("sources"))


# What a format has no place for, by what the source has.
REFUSED = {
    ("registers", "mae"): "register tokens, layer scale, a gated MLP, norms of eps 1e-05",
    ("registers", "hf"): "register tokens, layer scale, a gated MLP",
    ("windows", "mae"): "relative positions, no cls token, no norm after the last block, windowed attention",
    ("windows", "timm"): "relative positions, no cls token",
    ("windows", "hf"): "relative positions, no cls token",
    ("beit", "mae"): "layer scale, relative positions",
    ("beit", "timm"): "relative positions",
    ("beit", "hf"): "layer scale, relative positions",
    ("tuned", "hf"): "no norm after the last block",
}


@pytest.mark.parametrize("to", list(FORMATS))
@pytest.mark.parametrize("kind", ["official", "square", "oblong", "tuned", "registers", "windows", "beit"])
def test_round_trip_is_identity(kind: str, to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    there, back = tmp_path / f"there{ENDING[to]}", tmp_path / "back.safetensors"
    if (kind, to) in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[kind, to]):
            convert(sources[kind], there, to)
        assert list(tmp_path.iterdir()) == []
        return
    convert(sources[kind], there, to)
    convert(there, back, "backbone")
    first, second = read_checkpoint(sources[kind]), read_checkpoint(back)
    assert first.info == second.info
    expected = encoder_state(first.tensors)
    assert expected.keys() == second.tensors.keys()
    assert all(torch.equal(expected[name], second.tensors[name]) for name in expected)


def test_official_file_keeps_the_decoder(source: Path, mae: MaskedAutoencoder, tmp_path: Path) -> None:
    convert(source, tmp_path / "official.pth", "mae")
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    mae.load_state_dict(content["model"], strict=True)
    convert(source, tmp_path / "encoder.pth", "mae", encoder_only=True)
    names = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    assert not any("decoder" in name or "mask" in name for name in names)


def test_host_formats_have_the_hosts_names(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "d2.pth", "detectron2")
    names = torch.load(tmp_path / "d2.pth", weights_only=True)["model"]
    assert all(name.startswith("backbone.net.") for name in names)
    convert(source, tmp_path / "mm.pth", "mmseg")
    names = torch.load(tmp_path / "mm.pth", weights_only=True)["state_dict"]
    assert all(name.startswith("backbone.") and not name.startswith("backbone.net.") for name in names)


def test_positions_and_patches_are_resized(source: Path, mae: MaskedAutoencoder, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "x.safetensors", "backbone", patch_size=(12, 12), resize="bicubic")
    info, tensors = done.checkpoint.info, read_checkpoint(done.destination).tensors
    assert (info.patch_size, info.image_size, info.grid) == ((12, 12), (48, 72), (4, 6))  # the grid stays
    assert torch.equal(tensors["pos_embed"], mae.pos_embed)
    assert torch.equal(
        tensors["patch_embed.proj.weight"],
        resize_projection(mae.patch_embed.proj.weight, (12, 12), method="bicubic").detach(),
    )
    assert "decoder_pred.weight" in done.left_out
    done = convert(source, tmp_path / "y.pth", "mae", image_size=(64, 40))
    tensors = read_checkpoint(done.destination).tensors
    assert done.checkpoint.info.image_size == (64, 40) and done.checkpoint.info.positions == "learned"
    assert torch.equal(tensors["pos_embed"], resize_pos_embed(mae.pos_embed, (4, 6), (8, 5)).detach())
    assert torch.equal(tensors["decoder_pos_embed"], resize_pos_embed(mae.decoder_pos_embed, (4, 6), (8, 5)).detach())
    with pytest.raises(CheckpointError, match=r"decoder predicts the pixels of 8x8 patches.*--encoder-only"):
        convert(source, tmp_path / "z.pth", "mae", patch_size=(12, 12))
    with pytest.raises(ConfigError, match="not a whole number of 8x8 patches"):
        convert(source, tmp_path / "z.pth", "mae", image_size=(33, 40))


@pytest.mark.parametrize("kind", ["windows", "beit"])
def test_relative_tables_are_resized(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """What is resized once says what the source says when it resizes while running."""
    from mae_transfer import build_backbone

    convert(sources[kind], tmp_path / "x.safetensors", "backbone", image_size=(48, 64))
    images = torch.randn(1, 3, 48, 64)
    resized, before = build_backbone(tmp_path / "x.safetensors"), build_backbone(sources[kind])
    assert resized.grid == (6, 8)
    torch.testing.assert_close(resized(images), before(images), rtol=0, atol=1e-4)


def test_inspect_says_what_is_inside(source: Path) -> None:
    text = inspect(source)
    for part in (
        *("mae-transfer", "width 48, depth 2, heads 3", "8x8 px", "32x48 px", "1x25x48"),
        *("sha256", "licence     mit", "detection", "classification", "30 tensors as they are"),
        "not encoder the decoder (19 tensors), mask_token",
        "resized pos_embed: 1x25x48 -> 1x4097x48",
        "hf              no: transformers builds ViTMAEForPreTraining for square grids only",
    ):
        assert part in text, part


def test_a_folder_of_files_is_inspected(source: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(source.read_bytes())
    (folder / "b.pth").write_bytes(b"damaged")
    assert run_tool(main, ["--inspect", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "a.safetensors" in captured.out and captured.err.startswith("error: ") and "b.pth" in captured.err
    assert run_tool(main, ["--inspect", "--json", str(folder / "a.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == examine(source)["sha256"]


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
    assert run_tool(main, [str(source), str(tmp_path / "x.pth"), "--to", "hf"]) == 2
    assert "should be a folder" in capsys.readouterr().err


def test_the_tool_runs(source: Path, tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
    command = [
        sys.executable,
        str(tool),
        str(source),
        str(tmp_path / "out.pth"),
        "--to",
        "mae",
        "--image-size",
        "64x48",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "-> " in done.stdout and "licence: mit" in done.stdout, done.stderr
