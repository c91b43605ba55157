"""Semantic segmentation in MMSegmentation: everything that imports mmseg, mmengine or mmcv.

Importing this package registers ``MAEViT``, ``MAEPyramid``, ``MAESegmentor``, ``MAELayerDecayConstructor`` and what
training needs beside them, on registries that upstream MMSegmentation 1.2 and the onedl family share.
"""

from mae_transfer.errors import require

require("mmseg", "segmentation")

# The imports below register on mmseg's registries, so they must follow the check.
from mae_transfer.segmentation.backbone import MAEViT  # noqa: E402
from mae_transfer.segmentation.dataset import ADEFolder, LoadIndexMask, ReplaySampler  # noqa: E402
from mae_transfer.segmentation.heads import MAELinearHead  # noqa: E402
from mae_transfer.segmentation.hooks import (  # noqa: E402
    PredictionPictures,
    ReplayRandomness,
    SaveOnSignal,
    StopOnBadLoss,
)
from mae_transfer.segmentation.neck import MAEPyramid  # noqa: E402
from mae_transfer.segmentation.optimizer import MAEAmpOptimWrapper, MAELayerDecayConstructor  # noqa: E402
from mae_transfer.segmentation.segmentor import MAESegmentor  # noqa: E402

__all__ = [
    "ADEFolder",
    "LoadIndexMask",
    "MAEAmpOptimWrapper",
    "MAELayerDecayConstructor",
    "MAELinearHead",
    "MAEPyramid",
    "MAESegmentor",
    "MAEViT",
    "PredictionPictures",
    "ReplayRandomness",
    "ReplaySampler",
    "SaveOnSignal",
    "StopOnBadLoss",
]
