"""The config that configs/segmentation/README.md shows builds in MMSegmentation's own classes."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS

README = Path(__file__).resolve().parents[2] / "configs/segmentation/README.md"


def test_the_readmes_config_builds_in_stock_classes(tmp_path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "custom_imports" in block)
    path = tmp_path / "own.py"
    path.write_text(block)
    config = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
        model = MODELS.build(config.model)
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
    assert type(model) is EncoderDecoder
    with torch.no_grad():
        assert model._forward(torch.zeros(2, 3, 512, 512, device="meta")).shape == (2, 150, 128, 128)
    assert {group["layer_id"] for group in wrapper.optimizer.param_groups} == set(range(14))


def test_keys_are_the_published_ones_behind_backbone() -> None:
    with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
        backbone = MODELS.build({"type": "MAEViT", "size": "base", "relative_position": None, "layer_scale": None})
    from pretrain import build_mae

    with torch.device("meta"):
        published = build_mae("mae_vit_base_patch16").state_dict()
    assert set(backbone.state_dict()) == {
        name for name in published if not name.startswith(("decoder", "mask_token", "norm."))
    }
