"""MAEPyramid against MMSegmentation's Feature2Pyramid."""

from __future__ import annotations

import pytest
import torch
from mmseg.models.necks import Feature2Pyramid

from mae_transfer.segmentation import MAEPyramid
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
@pytest.mark.parametrize("norm", ["auto", "gn", "ln"])
def test_strides_are_4_8_16_32_for_every_patch(patch: int, grid: tuple[int, int], norm: str) -> None:
    neck = MAEPyramid(width=32, patch_size=patch, norm=norm).eval()
    height, width = grid[0] * patch, grid[1] * patch
    with torch.no_grad():
        maps = neck([torch.randn(1, 32, *grid)] * 4)
    assert [tuple(x.shape[2:]) for x in maps] == [(height // s, width // s) for s in (4, 8, 16, 32)]


def test_batch_norm_is_plain_on_one_process() -> None:
    assert norm_name("auto") == "bn"
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in MAEPyramid(width=8).modules())


def test_batch_norm_is_synchronised_on_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_transfer.segmentation.neck.get_world_size", lambda: 2)
    assert norm_name("auto") == "bn", "SyncBN does not run on CPUs"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert norm_name("auto") == "syncbn"
    assert norm_name("gn") == "gn"
