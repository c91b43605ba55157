"""A checkpoint of MMSegmentation's own MAE with UperNet gives here the logits that it gives there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from mae_transfer.errors import CheckpointError
from mae_transfer.segmentation.config import derive
from mae_transfer.segmentation.predict import build_model
from mae_transfer.segmentation.recipe import Facts
from mae_transfer.segmentation.release import in_our_names
from mae_transfer.segmentation.settings import read_settings
from tests.segmentation.conftest import stir

RECIPE = Path(mmseg.__file__).parent / ".mim/configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"


@pytest.fixture
def theirs() -> torch.nn.Module:
    """The model of MMSegmentation's config, made tiny, with weights and batch statistics that all matter."""
    config = Config.fromfile(RECIPE)
    config.model.pretrained = None
    config.model.data_preprocessor.size = (64, 64)
    config.model.backbone.update(img_size=(64, 64), patch_size=16, embed_dims=192, num_heads=3)
    config.model.neck.update(embed_dim=192, norm_cfg={"type": "BN"})
    config.model.decode_head.update(in_channels=[192] * 4, channels=32, num_classes=4, norm_cfg={"type": "BN"})
    config.model.auxiliary_head.update(in_channels=192, num_classes=4, norm_cfg={"type": "BN"})
    config.model.test_cfg = {"mode": "slide", "crop_size": (64, 64), "stride": (42, 42)}
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
    stir(model)
    model.train(False)  # their backbone's eval() returns None
    return model


def test_a_release_computes_what_it_does_in_mmsegmentation(theirs, tiny_facts: Facts, tmp_path: Path) -> None:
    path = tmp_path / "release.pth"
    about = {"CLASSES": ("a", "b"), "PALETTE": [[0, 0, 0]], "config": "", "mmseg_version": "0.24.0", "epoch": 55}
    torch.save({"meta": about, "state_dict": theirs.state_dict()}, path)
    settings = {"dataset": {"crop_size": 64}, "head": {"channels": 32}, "train": {"precision": "fp32"}}
    config = derive(read_settings(settings), replace(tiny_facts, patch_size=16), "run")
    ours = build_model(config, path).eval()
    for size in ((64, 64), (64, 150)):  # one window and several
        images, meta = torch.randn(2, 3, *size), [{"ori_shape": size, "img_shape": size}] * 2
        with torch.no_grad():
            expected, got = theirs.inference(images, meta), ours.inference(images, meta)
        torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_a_release_of_another_size_is_refused_by_name(theirs, tiny_config, tmp_path: Path) -> None:
    path = tmp_path / "release.pth"
    torch.save({"state_dict": theirs.state_dict()}, path)
    with pytest.raises(CheckpointError, match="is not of this model"):
        build_model(tiny_config(), path)


def test_our_own_names_stay(tiny_config) -> None:
    with DefaultScope.overwrite_default_scope("mmseg"):
        state = MODELS.build(tiny_config().model).state_dict()
    assert in_our_names(state) == state
