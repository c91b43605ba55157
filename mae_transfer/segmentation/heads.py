"""``MAELinearHead``: a linear classifier of every patch, as MMSegmentation's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class MAELinearHead(BaseDecodeHead):
    """A norm and a 1x1 convolution: linear probing (MAE, Appendix A.1) of every patch of a frozen encoder.

    The norm stands in for the encoder's final one, which maps for dense tasks are taken before.

    Args:
        in_channels: of the map that ``in_index`` picks.
        norm_cfg: the norm; batch normalisation keeps the probe linear.
        **kwargs: BaseDecodeHead's (``num_classes``, ``in_index``, ``dropout_ratio`` …).
    """

    def __init__(self, in_channels: int, *, norm_cfg: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(in_channels, in_channels, norm_cfg=norm_cfg, **kwargs)
        self.norm = build_norm_layer(norm_cfg, in_channels)[1]

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps (N, D, h, w) -> logits (N, classes, h, w)."""
        return self.cls_seg(self.norm(self._transform_inputs(inputs)))
