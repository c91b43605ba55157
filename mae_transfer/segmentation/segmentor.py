"""``MAESegmentor``: MMSegmentation's EncoderDecoder with exact padding and batched sliding windows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from mae_transfer.segmentation.geometry import whole_maps, window_counts, window_starts


@MODELS.register_module()
class MAESegmentor(EncoderDecoder):
    """EncoderDecoder whose inference pads correctly, runs several windows at once, and can run in bfloat16.

    Further keys of ``test_cfg``: ``window_batch`` (windows to a forward pass, 1 by default) and ``precision``
    ("fp32" by default, or "bf16").
    """

    def inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """(N, C, H, W) -> logits (N, classes, H, W), in the precision of ``test_cfg``; they leave in float32."""
        with self._precision(inputs):
            return super().inference(inputs, batch_img_metas)

    @contextlib.contextmanager
    def _precision(self, inputs: Tensor) -> Iterator[None]:
        wanted = self.test_cfg.get("precision", "fp32")
        if wanted == "fp32":
            yield
            return
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            yield

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """(N, C, H, W) of any size -> logits (N, classes, H, W), float32.

        The image is filled with zeros (its mean colour) at the bottom and right up to whole patches, and the same
        margin is cut from the logits, so that logits and pixels stay aligned.
        """
        height, width = inputs.shape[2:]
        unit = whole_maps(self.backbone.patch_size[0])
        pad_h, pad_w = -height % unit, -width % unit
        logits = self.decode_head.forward(self.extract_feat(F.pad(inputs, (0, pad_w, 0, pad_h))))
        logits = F.interpolate(
            logits.float(), size=(height + pad_h, width + pad_w), mode="bilinear", align_corners=self.align_corners
        )
        return logits[:, :, :height, :width]

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Average the logits of overlapping windows: (N, C, H, W) -> (N, classes, H, W), float32.

        Windows lie where MMSegmentation puts them. An image smaller than the window is filled up to it at the bottom
        and right, as crops are in training, and the margin is cut from the logits. ``batch_img_metas`` is not touched.
        """
        crop, stride = tuple(self.test_cfg.crop_size), tuple(self.test_cfg.stride)
        num_images, _, height, width = inputs.shape
        padded = F.pad(inputs, (0, max(crop[1] - width, 0), 0, max(crop[0] - height, 0)))
        tops = window_starts(padded.shape[2], crop[0], stride[0])
        lefts = window_starts(padded.shape[3], crop[1], stride[1])
        windows = [(image, top, left) for top in tops for left in lefts for image in range(num_images)]
        total = padded.new_zeros((num_images, self.out_channels, *padded.shape[2:]), dtype=torch.float32)
        size = self.test_cfg.get("window_batch", 1)
        for first in range(0, len(windows), size):
            batch = windows[first : first + size]
            crops = torch.stack([padded[i, :, y : y + crop[0], x : x + crop[1]] for i, y, x in batch])
            logits = self.encode_decode(crops, batch_img_metas)  # (windows, classes, crop)
            for (i, y, x), window in zip(batch, logits, strict=True):
                total[i, :, y : y + crop[0], x : x + crop[1]] += window
        if len(tops) * len(lefts) > 1:
            # How many windows a pixel lies in: those over its row times those over its column.
            by_row, by_column = (
                total.new_tensor(window_counts(length, side, starts))
                for length, side, starts in zip(padded.shape[2:], crop, (tops, lefts), strict=True)
            )
            total /= by_row[:, None] * by_column
        return total[:, :, :height, :width]
