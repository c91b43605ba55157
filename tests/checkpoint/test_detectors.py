"""Detectron2's releases: pickles are read without running them, whole detectors and encoders come out of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from torch import nn

from mae_transfer import build_vit, load_backbone
from mae_transfer.checkpoint import describe, read_checkpoint, write_safetensors, write_torch
from mae_transfer.checkpoint.detectors import is_detector, load_detector, read_detector
from mae_transfer.checkpoint.pickles import read_pickle
from mae_transfer.errors import CheckpointError
from tests.detection.small import VITDET, small_detector
from tests.oracles import vitdet


def theirs() -> nn.Module:
    """Detectron2's own ViTDet, made small, with weights that all matter."""
    cfg = vitdet(**VITDET)
    cfg.roi_heads.box_predictor.test_score_thresh = 0.0
    torch.manual_seed(0)
    model = instantiate(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def ours(**overrides: Any) -> nn.Module:
    return small_detector(**{"score_threshold": 0.0, **overrides}).eval()


@pytest.fixture(scope="module")
def released() -> nn.Module:
    return theirs()


@pytest.fixture(scope="module")
def release(released: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the model zoo's are: arrays by name, and who made it."""
    path = tmp_path_factory.mktemp("zoo") / "model_final_61ccd1.pkl"
    weights = {name: value.numpy() for name, value in released.state_dict().items()}
    weights["pixel_mean"] = np.zeros((3, 1, 1), np.float32)  # older files carry these two
    weights["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "ViTDet", "iteration": 184374}, protocol=2))
    return path


def test_a_release_detects_what_it_does_in_detectron2(released: nn.Module, release: Path) -> None:
    DetectionCheckpointer(released).load(str(release))  # Detectron2 itself takes the file for one of its own
    model = ours()
    report = load_detector(model, release)
    assert set(report.loaded) == set(model.state_dict())
    assert not (report.resized or report.missing or report.unexpected or report.other_categories)
    image = {"image": torch.randint(0, 256, (3, 64, 48), dtype=torch.uint8), "height": 64, "width": 48}
    with torch.no_grad():
        expected, got = released([image])[0]["instances"], model([image])[0]["instances"]
    assert len(expected) > 10
    torch.testing.assert_close(got.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-5, rtol=1e-4)
    assert torch.equal(got.pred_classes, expected.pred_classes)
    assert (got.pred_masks == expected.pred_masks).float().mean() > 0.999


def test_an_encoder_is_taken_out_of_a_release(released: nn.Module, release: Path) -> None:
    vit = build_vit("tiny", image_size=32, cls_token=False, final_norm=False)
    report = load_backbone(vit, release)
    assert report.family == "detectron2" and not report.missing and not report.resized
    assert {name.split(".")[-1] for name in report.unexpected} == {"rel_pos_h", "rel_pos_w"}
    assert torch.equal(vit.blocks[3].mlp.fc1.weight, released.backbone.net.blocks[3].mlp.fc1.weight)


@pytest.mark.parametrize("ending", [".pth", ".pkl"])
def test_both_containers_hold_the_same(ending: str, released: nn.Module, tmp_path: Path) -> None:
    path, state = tmp_path / f"release{ending}", released.state_dict()
    if ending == ".pth":
        write_torch(path, {"model": state})
    else:
        arrays = pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}}, protocol=2)
        path.write_bytes(arrays.replace(b"numpy._core", b"numpy.core"))  # as numpy 1 has written them
    assert is_detector(path)
    got = read_detector(path)
    assert {name.replace("backbone.pyramid.", "backbone."): value.sum() for name, value in got.items()} == {
        name: value.sum() for name, value in state.items()
    }


def test_other_categories_and_sizes_are_explained(release: Path) -> None:
    model = ours(num_classes=7, image_size=96, square_size=96, position_size=96)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_detector(model, release)
    assert report.other_categories == [
        f"roi_heads.{layer}.{kind}"
        for layer in ("box_predictor.bbox_pred", "box_predictor.cls_score", "mask_head.predictor")
        for kind in ("bias", "weight")
    ]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.other_categories)
    assert report.resized.keys() == {
        "backbone.net.pos_embed",
        *(f"backbone.net.blocks.{block}.attn.rel_pos_{axis}" for block in (2, 5, 8, 11) for axis in "hw"),
    }
    assert "of other categories" in str(report)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"box_convs": 2}, "no place for roi_heads.box_head.conv"),
        ({"rpn_convs": 3}, "lacks proposal_generator.rpn_head.conv.conv"),
        ({"box_fc_width": 64}, "shapes differ: .*roi_heads.box_head.fc1"),
        ({"pyramid": "fpn", "norm": "GN", "channels": 32}, "backbone.fpn"),
    ],
)
def test_another_detector_is_refused_and_left_as_it_was(overrides: Any, message: str, release: Path) -> None:
    model = ours(**overrides)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_detector(model, release)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_encoder_is_no_detector(tmp_path: Path) -> None:
    vit = build_vit("tiny", depth=4, image_size=32)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit).to_metadata())
    assert not is_detector(path) and not is_detector(tmp_path / "nowhere.pkl")
    with pytest.raises(CheckpointError, match="no whole detector"):
        read_detector(path)


class Innocent:
    """Stands for any object whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return (print, ("this pickle ran code",))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_anything_else_are_refused_unread(protocol: int, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "unsafe.pkl"
    path.write_bytes(pickle.dumps({"model": {"pos_embed": np.zeros(3)}, "extra": Innocent()}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"names (builtins|__builtin__)\.print.*convert it once"):
        read_checkpoint(path)
    evil = np.array([Innocent()], dtype=object)
    path.write_bytes(pickle.dumps({"model": {"pos_embed": evil}}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"names (builtins|__builtin__)\.print"):
        read_checkpoint(path)
    assert "ran code" not in capsys.readouterr().out


def test_damaged_pickles_are_named(release: Path, tmp_path: Path) -> None:
    whole = release.read_bytes()
    path = tmp_path / "damaged.pkl"
    for content in (b"", b"not a pickle", whole[:1000], whole[:-1], whole[: len(whole) // 2], b"\x80\x02csys\n\n."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged\.pkl"):
            read_checkpoint(path)
    rng = np.random.default_rng(0)
    for _ in range(50):
        spoilt = bytearray(whole[:3000])
        for at in rng.integers(0, len(spoilt), size=5):
            spoilt[at] = rng.integers(0, 256)
        path.write_bytes(bytes(spoilt))
        with pytest.raises(CheckpointError, match=r"damaged\.pkl"):
            read_checkpoint(path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_every_protocol_and_order_are_read(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "arrays.pkl"
    arrays = {
        "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i4"),
        "half": np.ones(2, np.float16),
        "scalar": np.float32(2.5),
        "text": np.array(["x"]),
    }
    path.write_bytes(pickle.dumps(arrays, protocol=protocol))
    content = read_pickle(path)
    for name in ("plain", "fortran", "big endian", "half"):
        assert isinstance(content[name], torch.Tensor)
        assert np.array_equal(content[name].numpy(), arrays[name])
    assert content["scalar"] == 2.5


def test_huge_patches_of_14_become_16(tmp_path: Path) -> None:
    """ViTDet's huge encoder; the resize is the one that its authors state, the position grid goes from 16² to 14²."""
    source = build_vit("tiny", depth=4, patch_size=14, image_size=224)
    path = tmp_path / "mae_pretrain_vit_huge.pth"
    write_torch(path, {"model": source.state_dict()})
    vit = build_vit("tiny", depth=4, patch_size=16, image_size=224, cls_token=False, final_norm=False)
    report = load_backbone(vit, path)
    assert report.resized == {
        "pos_embed": "1x257x192 -> 1x197x192",
        "patch_embed.proj.weight": "192x3x14x14 -> 192x3x16x16",
    }
    expected = F.interpolate(source.patch_embed.proj.weight, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(vit.patch_embed.proj.weight, expected)
    with pytest.raises(CheckpointError, match="is 192x3x14x14, the model has 192x3x8x8"):
        load_backbone(build_vit("tiny", depth=4, patch_size=8, image_size=224), path)
