"""What is exported computes what the model does, in onnxruntime and after torch.export, to 1e-4 of the largest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.errors import ConfigError, run_tool
from mae_transfer.export import kind_of, main
from mae_transfer.segmentation.export import export, load_model
from mae_transfer.vit import build_vit
from tests.segmentation.conftest import CLASSES, stir

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "segmentation"


def random_model(config: Any) -> Any:
    """The config's model on two blocks, with weights that all matter, batch statistics included."""
    torch.manual_seed(0)
    config.model.backbone.update(depth=2, taps=[0, 0, 1, 1][-len(config.model.backbone.taps) :])
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
    stir(model)
    return model.eval()


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"encoder": {"relative_position": None, "pyramid": "simple"}}, marks=pytest.mark.slow),
        {"head": {"kind": "linear", "channels": None}},
        pytest.param({"head": {"kind": "fcn"}}, marks=pytest.mark.slow),
    ],
    ids=["upernet", "simple pyramid", "linear", "fcn"],
)
def test_onnxruntime_computes_the_models_logits(tiny_config: Any, sections: Any, tmp_path: Path) -> None:
    model, path = random_model(tiny_config(**sections)), tmp_path / "model.onnx"
    # Neither the crop of training (64) nor whole patches (8): tables are resized, margins filled and cut away.
    line = export(model, path, image_size=(72, 101), classes=CLASSES)
    assert "onnxruntime" in line and "differs from PyTorch by at most" in line
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["classes"].split("\n") == list(CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, size=(3, 3, 72, 101)).astype(np.float32)  # another batch size
    (got,) = session.run(["logits"], {"images": pixels})
    # MMSegmentation's own way from pixels to logits: BGR images through the data preprocessor.
    inputs = [torch.from_numpy(image[::-1].copy()) for image in pixels]
    with torch.no_grad():
        expected = model.encode_decode(model.data_preprocessor({"inputs": inputs}, False)["inputs"], []).numpy()
    assert got.shape == (3, 4, 72, 101)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert [file.name for file in tmp_path.glob("model*")] == ["model.onnx"]


@pytest.mark.slow
def test_torch_export_computes_the_models_logits(tiny_config: Any, tmp_path: Path) -> None:
    model, path = random_model(tiny_config()), tmp_path / "model.pt2"
    assert "torch.export differs from PyTorch by at most" in export(model, path, image_size=(64, 64), classes=CLASSES)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("model.pb", (64, 64), "should end in .onnx"),
        ("model.onnx", (0, 64), "image size 0x64"),
        ("there.onnx", (64, 64), "exists and is left as it is"),
    ],
)
def test_what_cannot_be_written(tiny_config: Any, name: str, size: tuple[int, int], message: str, tmp_path) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(ConfigError, match=message):
        export(random_model(tiny_config()), tmp_path / name, image_size=size, classes=CLASSES)
    assert (tmp_path / "there.onnx").read_text() == "mine"


def test_a_config_gives_its_checkpoints_weights(make_folder, tmp_path: Path) -> None:
    encoder = build_vit("tiny", patch_size=8, image_size=32)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, encoder.state_dict(), describe(encoder).to_metadata())
    options = [f"dataset.root={make_folder()}", "dataset.reduce_zero_label=False", f"init_checkpoint={path}"]
    model, config = load_model(CONFIGS / "upernet_tiny.py", options)
    name = "blocks.3.mlp.fc1.weight"
    assert torch.equal(model.backbone.state_dict()[name], encoder.state_dict()[name])
    assert config.facts.classes == CLASSES


def test_runs_are_named_and_stand_as_they_are(make_folder, tiny_config: Any, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tiny_config().dump(run / "config.py")
    torch.save({"state_dict": {}}, run / "iter_1.pth")
    out = str(tmp_path / "model.onnx")
    assert run_tool(main, [str(run), out, "train.lr=1"]) == 2
    assert "only a config takes overrides" in capsys.readouterr().err
    assert run_tool(main, [str(run / "config.py"), out]) == 2
    assert "lies in a run; name its folder" in capsys.readouterr().err
    assert run_tool(main, [str(tmp_path / "none.py"), out]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((CONFIGS.parent).glob("[ds]*/*.py")), ids=lambda path: path.stem)
def test_configs_are_recognised(path: Path) -> None:
    assert kind_of(str(path)) == path.parent.name
