"""Semantic segmentation in MMSegmentation: everything that imports mmseg, mmengine or mmcv.

Importing this package registers ``MAEViT``, ``MAEPyramid``, ``MAESegmentor``, ``MAELayerDecayConstructor`` and what
training needs beside them, on registries that upstream MMSegmentation 1.2 and the onedl family share.
"""

import contextlib
import io
import warnings

from mae_transfer.errors import require

require("mmseg", "segmentation")
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    # MMSegmentation says which optional packages are not there, none of which is used here.
    warnings.simplefilter("ignore")
    import mmseg.datasets
    import mmseg.models  # noqa: F401

# The losses are averaged as published, and the config says so; MMSegmentation warns of it in every run all the same.
warnings.filterwarnings("ignore", message=r"Default ``avg_non_ignore`` is False")

# The imports below register on mmseg's registries, so they must follow the check.
from mae_transfer.segmentation.backbone import MAEViT  # noqa: E402
from mae_transfer.segmentation.dataset import LabelledImages, LoadLabels, LoadPicture, ReplaySampler  # noqa: E402
from mae_transfer.segmentation.heads import MAELinearHead  # noqa: E402
from mae_transfer.segmentation.hooks import (  # noqa: E402
    AverageWeights,
    PredictionPictures,
    RecordMetrics,
    SaveOnSignal,
    ShareForValidation,
    StopOnBadLoss,
)
from mae_transfer.segmentation.loop import MAETrainLoop  # noqa: E402
from mae_transfer.segmentation.losses import MAEDiceLoss  # noqa: E402
from mae_transfer.segmentation.neck import MAEPyramid, MAESimplePyramid  # noqa: E402
from mae_transfer.segmentation.optimizer import (  # noqa: E402
    MAEAmpOptimWrapper,
    MAELayerDecayConstructor,
    MAEOptimWrapper,
)
from mae_transfer.segmentation.predict import Predictor  # noqa: E402
from mae_transfer.segmentation.processes import MAEDistributedDataParallel  # noqa: E402
from mae_transfer.segmentation.segmentor import MAESegmentor  # noqa: E402
from mae_transfer.segmentation.upernet import MAEUPerHead  # noqa: E402

__all__ = [
    "AverageWeights",
    "LabelledImages",
    "LoadLabels",
    "LoadPicture",
    "MAEAmpOptimWrapper",
    "MAEDiceLoss",
    "MAEDistributedDataParallel",
    "MAELayerDecayConstructor",
    "MAELinearHead",
    "MAEOptimWrapper",
    "MAEPyramid",
    "MAESegmentor",
    "MAESimplePyramid",
    "MAETrainLoop",
    "MAEUPerHead",
    "MAEViT",
    "PredictionPictures",
    "Predictor",
    "RecordMetrics",
    "ReplaySampler",
    "SaveOnSignal",
    "ShareForValidation",
    "StopOnBadLoss",
]
