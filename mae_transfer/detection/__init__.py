"""Mask and Cascade R-CNN in Detectron2 on the one encoder: everything that imports detectron2 is below this folder.

Importing this package registers ``build_mae_vit_fpn_backbone`` and ``build_mae_vit_sfp_backbone`` in Detectron2's
``BACKBONE_REGISTRY``; ``add_mae_config`` adds their section to a yacs config.
"""

import warnings

from mae_transfer.errors import require

require("detectron2", "detection")
with warnings.catch_warnings():
    # Detectron2 scripts a few helpers and names a part of timm by ways that both have since deprecated.
    warnings.simplefilter("ignore")
    import detectron2.modeling  # noqa: F401

from mae_transfer.detection.backbone import MAEBackbone  # noqa: E402
from mae_transfer.detection.model import mask_rcnn  # noqa: E402
from mae_transfer.detection.predict import Predictor  # noqa: E402
from mae_transfer.detection.yacs import add_mae_config, build_optimizer  # noqa: E402

__all__ = ["MAEBackbone", "Predictor", "add_mae_config", "build_optimizer", "mask_rcnn"]
