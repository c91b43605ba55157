"""Encoders that are no plain ViT as the backbone: the config takes from the file what belongs to its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.segmentation.config import load_config
from mae_transfer.vit import build_vit
from tests.checkpoint.foreign import assert_equal, pictures
from tests.checkpoint.hosted import FOREIGN, SIDE, last_map

TINY = Path(__file__).resolve().parents[2] / "configs" / "segmentation" / "upernet_tiny.py"


def options(folder: Path, path: Path, relative: str | None) -> dict[str, Any]:
    return {
        "dataset.root": str(folder),
        "dataset.crop_size": SIDE,
        "init_checkpoint": str(path),
        "encoder.size": None,
        "encoder.relative_position": relative,
    }


@pytest.mark.parametrize("family", FOREIGN)
def test_features_are_those_of_the_familys_own_model(family: str, make_folder: Any, tmp_path: Path) -> None:
    foreign = FOREIGN[family]
    path, theirs = foreign.save(tmp_path)
    config = load_config(TINY, options(make_folder(), path, foreign.relative_position), work_dir=str(tmp_path))
    config.dump(str(tmp_path / "config.py"))  # as a run does; it is tested from that alone
    path.rename(tmp_path / "moved.pth")
    again = load_config(tmp_path / "config.py", {}, work_dir=str(tmp_path), for_training=False)
    backbone = MODELS.build({**again.model.backbone, "init_checkpoint": str(tmp_path / "moved.pth")}).eval()
    backbone.init_weights()
    images = pictures(SIDE, SIDE)
    with torch.no_grad():
        assert_equal(backbone(images)[-1], last_map(theirs, images))


def test_what_relative_positions_exclude_is_said_with_what_to_set(make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder()
    for family, given in (("DINOv3", "bias"), ("BEiT", None)):
        path, _ = FOREIGN[family].save(tmp_path)
        setting = f"encoder.relative_position={FOREIGN[family].relative_position}"
        with pytest.raises(ConfigError, match=setting):
            load_config(TINY, options(folder, path, given), work_dir=str(tmp_path))


def test_an_encoder_of_no_named_size(make_folder: Any, tmp_path: Path) -> None:
    vit = build_vit("tiny", image_size=SIDE, width=64, depth=6, num_heads=2)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit).to_metadata())
    given = options(make_folder(), path, None)
    config = load_config(TINY, given, work_dir=str(tmp_path))
    tiny = load_config(TINY, given | {"encoder.size": "tiny"}, work_dir=str(tmp_path))
    images = pictures(SIDE, SIDE)
    with DefaultScope.overwrite_default_scope("mmseg"), torch.no_grad():
        model = MODELS.build(config.model).eval()
        model.backbone.init_weights()
        for ours, wanted in zip(model.backbone(images), vit.forward_taps(images, [1, 2, 3, 5])):
            assert torch.equal(ours, wanted)
        assert model(images, mode="tensor").shape[1] == model.decode_head.num_classes
        with pytest.raises(CheckpointError, match="does not fit this 192-wide, 12-block model"):
            MODELS.build(tiny.model).backbone.init_weights()
