"""The necks: MAEPyramid against MMSegmentation's Feature2Pyramid, MAESimplePyramid against Detectron2's."""

from __future__ import annotations

import pytest
import torch
from mmseg.models.necks import Feature2Pyramid

from mae_transfer.segmentation import MAEPyramid, MAESimplePyramid
from mae_transfer.segmentation.neck import norm_name


def test_equals_feature2pyramid() -> None:
    ours = MAEPyramid(width=24, patch_size=16, norm="bn").eval()
    theirs = Feature2Pyramid(24, norm_cfg={"type": "BN", "requires_grad": True}).eval()
    state = ours.state_dict()
    names = {"levels.0.": "upsample_4x.", "levels.1.": "upsample_2x."}
    renamed = {names[name[:9]] + name[9:]: tensor for name, tensor in state.items()}
    for name, tensor in renamed.items():  # statistics that show
        if name.endswith("running_mean"):
            tensor.normal_()
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    theirs.load_state_dict(renamed)
    maps = [torch.randn(2, 24, 6, 10) for _ in range(4)]
    with torch.no_grad():
        for mine, reference in zip(ours(maps), theirs(maps), strict=True):
            torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(("patch", "grid"), [(16, (4, 6)), (8, (8, 12)), (14, (8, 16)), (32, (2, 3))])
@pytest.mark.parametrize("norm", ["auto", "bn", "gn", "ln"])
def test_strides_are_4_8_16_32_for_every_patch(patch: int, grid: tuple[int, int], norm: str) -> None:
    neck = MAEPyramid(width=32, patch_size=patch, norm=norm).eval()
    height, width = grid[0] * patch, grid[1] * patch
    with torch.no_grad():
        maps = neck([torch.randn(1, 32, *grid)] * 4)
    assert [tuple(x.shape[2:]) for x in maps] == [(height // s, width // s) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize(("patch", "grid"), [(16, (4, 6)), (8, (8, 12)), (14, (8, 16)), (32, (2, 3))])
@pytest.mark.parametrize("norm", ["auto", "bn", "gn", "ln"])
def test_the_simple_pyramid_has_the_same_strides_from_the_last_map(
    patch: int, grid: tuple[int, int], norm: str
) -> None:
    neck = MAESimplePyramid(width=32, patch_size=patch, norm=norm, out_channels=24).eval()
    height, width = grid[0] * patch, grid[1] * patch
    last = torch.randn(1, 32, *grid)
    with torch.no_grad():
        maps = neck([torch.full((1, 32, *grid), torch.nan), last])
        assert all(torch.equal(mine, alone) for mine, alone in zip(maps, neck([last]), strict=True))
    assert [tuple(x.shape[1:]) for x in maps] == [(24, height // s, width // s) for s in (4, 8, 16, 32)]


def test_the_simple_pyramid_equals_detectron2s() -> None:
    modeling = pytest.importorskip("detectron2.modeling.backbone")
    layers = pytest.importorskip("detectron2.layers")

    class Identity(modeling.Backbone):
        def __init__(self) -> None:
            super().__init__()
            self._out_features, self._out_feature_strides = ["x"], {"x": 16}
            self._out_feature_channels = {"x": 32}

        def output_shape(self) -> dict:
            return {"x": layers.ShapeSpec(channels=32, stride=16)}

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    ours = MAESimplePyramid(width=32).eval()
    theirs = modeling.SimpleFeaturePyramid(Identity(), "x", 256, (4.0, 2.0, 1.0, 0.5), norm="LN").eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 32, 4, 6)
    with torch.no_grad():
        for mine, reference in zip(ours([x]), theirs(x).values(), strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


def test_batch_norm_is_plain_on_one_process() -> None:
    assert norm_name("auto") == "bn"
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in MAEPyramid(width=8).modules())


def test_batch_norm_is_synchronised_on_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_transfer.segmentation.neck.get_world_size", lambda: 2)
    assert norm_name("auto") == "bn", "SyncBN does not run on CPUs"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert norm_name("auto") == "syncbn"
    assert norm_name("gn") == "gn"
