"""What is exported computes what PyTorch does, in onnxruntime and after torch.export; what cannot be, is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.export import TracingAdapter
from torch import nn

from mae_transfer.checkpoint import describe, encoder_state, read_checkpoint, write_safetensors
from mae_transfer.detection import mask_rcnn
from mae_transfer.detection.backbone import MAEBackbone
from mae_transfer.detection.export import export, load_detector_of
from mae_transfer.errors import ConfigError, RunFailed, run_tool
from mae_transfer.export import main
from mae_transfer.vit import VisionTransformer, build_vit

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)


def detector(pyramid: str = "sfp", relative: str = "decomposed", depth: int = 2) -> Any:
    """The parts of a detector that are exported, of few blocks, with weights that all matter."""
    torch.manual_seed(0)
    net = VisionTransformer(
        image_size=64,  # positions are resized
        patch_size=16,
        width=96,
        depth=depth,
        num_heads=3,
        cls_token=False,
        final_norm=False,
        window_size=3,  # windows are padded
        global_blocks=(1,),
        relative_position=relative,
        attention_image_size=128,
    )
    backbone = MAEBackbone(net, pyramid=pyramid, out_channels=32, norm="LN" if pyramid == "sfp" else "GN").eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return SimpleNamespace(backbone=backbone, pixel_mean=mean, pixel_std=std)


@pytest.mark.parametrize(
    ("pyramid", "relative", "depth"),
    [("sfp", "decomposed", 2), pytest.param("fpn", "bias", 4, marks=pytest.mark.slow)],
)
def test_onnxruntime_computes_the_same(pyramid: str, relative: str, depth: int, tmp_path: Path) -> None:
    model, path = detector(pyramid, relative, depth), tmp_path / "features.onnx"
    line = export(model, path, image_size=(96, 160))
    assert "onnxruntime" in line and "differs from PyTorch by at most" in line
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, size=(3, 3, 96, 160)).astype(np.float32)  # another batch size
    got = session.run(None, {"images": pixels})
    normalised = (pixels - np.array(MEAN, np.float32)[:, None, None]) / np.array(STD, np.float32)[:, None, None]
    with torch.no_grad():
        expected = model.backbone(torch.from_numpy(normalised))
    assert [output.name for output in session.get_outputs()] == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    for level, feature in zip(got, expected.values()):
        np.testing.assert_allclose(level, feature.numpy(), rtol=1e-3, atol=1e-4 * float(feature.abs().max()))
    assert [file.name for file in tmp_path.iterdir()] == ["features.onnx"]


@pytest.mark.slow
def test_torch_export_computes_the_same(tmp_path: Path) -> None:
    model, path = detector(), tmp_path / "features.pt2"
    assert "torch.export differs from PyTorch by at most" in export(model, path, image_size=(64, 96))
    images = torch.randint(0, 256, (5, 3, 64, 96)).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        expected = model.backbone((images - mean) / std)
        got = torch.export.load(path).module()(images)
    for level, feature in zip(got, expected.values()):
        torch.testing.assert_close(level, feature, atol=1e-4, rtol=1e-3)


class Convolutions(nn.Module):
    """Stands for a backbone where only what is done with the file matters."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = SimpleNamespace(size_divisibility=32)
        self.net = VisionTransformer(image_size=32, width=8, depth=1, num_heads=1)
        self.levels = nn.ModuleList(nn.Conv2d(3, 4, 4, stride) for stride in (4, 8, 16, 32, 64))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"p{number}": level(images) for number, level in enumerate(self.levels, start=2)}


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple = detector()
    simple.backbone, path = Convolutions(), tmp_path / "features.pt2"
    monkeypatch.setattr("mae_transfer.engine.export.TOLERANCE", -1.0)
    with pytest.raises(RunFailed, match="differ from PyTorch's"):
        export(simple, path, image_size=(64, 64))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    for overwrite in (False, True):
        export(simple, path, image_size=(64, 64), overwrite=overwrite)
        assert [file.name for file in tmp_path.iterdir()] == ["features.pt2"]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("features.pb", (64, 64), "should end in .onnx"),
        ("features.onnx", (64, 40), "64x40: expected multiples of 32"),
        ("there.onnx", (64, 64), "exists and is left as it is"),
    ],
)
def test_what_cannot_be_written(name: str, size: tuple[int, int], message: str, tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(ConfigError, match=message):
        export(detector(), tmp_path / name, image_size=size)
    assert (tmp_path / "there.onnx").read_text() == "mine"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.safetensors"
    vit = build_vit("tiny", patch_size=16, image_size=32)
    write_safetensors(path, encoder_state(vit.state_dict()), describe(vit, mean=(0.1, 0.2, 0.3)).to_metadata())
    return path


def test_a_config_gives_its_checkpoints_weights(encoder: Path) -> None:
    loaded, side = load_detector_of(CONFIGS / "tiny.py", [f"train.init_checkpoint={encoder}", "model.window_size=3"])
    assert side == 256
    expected = read_checkpoint(encoder).tensors["blocks.3.mlp.fc1.weight"]
    assert torch.equal(loaded.backbone.net.blocks[3].mlp.fc1.weight, expected)
    assert loaded.pixel_mean.flatten().tolist() == pytest.approx([25.5, 51, 76.5])


def test_runs_are_named_and_stand_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "features.pt2")
    assert run_tool(main, [str(tmp_path), out]) == 2
    assert "holds no config of a detection or segmentation run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model: {_target_: mae_transfer.detection.mask_rcnn}")
    assert run_tool(main, [str(tmp_path), out, "model.size=base"]) == 2
    assert "only a config takes overrides" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny", "tiny_fpn"])
def test_the_tool_exports_every_tiny_config(config: str, encoder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "features.onnx"
    given = [str(CONFIGS / f"{config}.py"), str(out), "--image-size", "64", "96", f"train.init_checkpoint={encoder}"]
    assert run_tool(main, given) == 0
    assert "RGB pixels (N, 3, 64, 96) -> p2 to p6; onnxruntime" in capsys.readouterr().out
    assert out.is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of tracing itself
def test_a_whole_detector_is_traced_but_not_exported() -> None:
    """What export.py says of the heads is true of this Detectron2 and this torch."""
    torch.manual_seed(0)
    model: nn.Module = mask_rcnn(
        num_classes=2,
        image_size=64,
        square_size=64,
        pixel_mean=MEAN,
        pixel_std=STD,
        size="tiny",
        window_size=3,
        channels=16,
        box_fc_width=32,
        score_threshold=0.0,
    ).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    adapter = TracingAdapter(
        model, [{"image": images[0]}], lambda m, inputs: [{"instances": m.inference(inputs, do_postprocess=False)[0]}]
    )
    with torch.no_grad():
        with pytest.raises(Exception, match="data-dependent") as refused:
            torch.export.export(adapter, (images[0],), strict=False)
        assert "GuardOnDataDependent" in type(refused.value).__name__
        traced = torch.jit.trace(adapter, (images[0],), check_trace=False)
        for got, expected in zip(traced(images[1]), adapter(images[1])):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
