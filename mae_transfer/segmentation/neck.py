"""The feature pyramids as MMSegmentation's necks: ``MAEPyramid`` of four taps, ``MAESimplePyramid`` of the last map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import get_world_size
from mmseg.registry import MODELS
from torch import Tensor

from mae_transfer.pyramid import FourTapPyramid, SimpleFeaturePyramid


def norm_name(norm: str) -> str:
    """Resolve "auto": "syncbn" where several processes train on GPUs, "bn" otherwise.

    SyncBN runs on GPUs only, and on one process equals BN, under the same parameter names.
    """
    if norm != "auto":
        return norm
    return "syncbn" if get_world_size() > 1 and torch.cuda.is_available() else "bn"


@MODELS.register_module()
class MAEPyramid(FourTapPyramid):
    """Four maps of one stride (the patch) -> four maps of strides 4, 8, 16, 32, width kept (BEiT; Li et al. 2021).

    Args:
        width: D of the maps.
        patch_size: stride of the maps in pixels; the factors follow from it.
        norm: "auto" (see ``norm_name``), "bn", "syncbn", "gn" or "ln".
    """

    def __init__(self, width: int, patch_size: int = 16, norm: str = "auto") -> None:
        super().__init__(width, patch_size, norm=norm_name(norm))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Four (N, D, h, w) -> a tuple of four, as MMSegmentation's heads expect."""
        return tuple(super().forward(list(maps)))


@MODELS.register_module()
class MAESimplePyramid(SimpleFeaturePyramid):
    """The last map -> four maps of strides 4, 8, 16, 32 (ViTDet, Section 3): the variant without taps.

    Args:
        width: D of the map.
        patch_size: stride of the map in pixels; the factors follow from it.
        norm: as for ``MAEPyramid``; ViTDet's is "ln".
        out_channels: of every map; None for ViTDet's 256.
    """

    def __init__(self, width: int, patch_size: int = 16, norm: str = "ln", out_channels: int | None = None) -> None:
        super().__init__(width, patch_size, out_channels=out_channels or 256, norm=norm_name(norm))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Any number of (N, D, h, w), of which the last is taken -> four (N, out_channels, H/s, W/s)."""
        return tuple(super().forward(maps[-1]))
