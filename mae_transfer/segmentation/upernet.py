"""``MAEUPerHead``: MMSegmentation's UPerHead, its costliest convolution computed where the maps are small.

UPerHead enlarges three of its four maps to the largest one's size, concatenates all of them and convolves that: 58 % of
the operations of ViT-B's UperNet. Enlarging and convolving are both linear, so the products with the kernel's nine
taps can be taken on the maps before they are enlarged: 4, 16 and 64 times fewer of them, 3 times fewer in all. What is
left of enlarging and shifting is linear in the rows and in the columns, and is two small matrix products.

Shapes: N batch, C channels of a map, O of the result, (h, w) of a map, (H, W) enlarged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS
from torch import Tensor

from mae_transfer.recompute import runs_on_cpu


@MODELS.register_module()
class MAEUPerHead(UPerHead):
    """UPerHead with its arguments, parameters and results (to rounding); faster on CPUs, where that was measured.

    Elsewhere, and while a compiler or an exporter reads the operators, they are MMSegmentation's.
    """

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Four maps (N, C, h, w) of strides 4, 8, 16, 32 -> (N, O, H, W) at stride 4, before classification."""
        if not runs_on_cpu(inputs[0]):
            return super()._forward_feature(inputs)
        inputs = self._transform_inputs(inputs)
        laterals = [lateral(x) for lateral, x in zip(self.lateral_convs, inputs)]
        laterals.append(self.psp_forward(inputs))
        for finer in reversed(range(len(laterals) - 1)):
            laterals[finer] = laterals[finer] + self._enlarge(laterals[finer + 1], laterals[finer].shape[2:])
        maps = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        maps.append(laterals[-1])
        return self._fuse(maps)

    def _enlarge(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=self.align_corners)

    def _fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """``fpn_bottleneck`` of all maps enlarged to the first one's size and concatenated."""
        first, *others = maps
        fuse = self.fpn_bottleneck
        of_first, *of_others = fuse.conv.weight.split([x.shape[1] for x in maps], dim=1)
        out = F.conv2d(first, of_first, fuse.conv.bias, padding=1)
        for x, weight in zip(others, of_others, strict=True):
            out += conv_of_enlarged(x, weight, first.shape[2:], align_corners=self.align_corners)
        if fuse.with_norm:
            out = fuse.norm(out)
        return fuse.activate(out) if fuse.with_activation else out


def conv_of_enlarged(x: Tensor, weight: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """A 3x3 convolution, padded by one zero, of ``x`` enlarged bilinearly: (N, C, h, w) -> (N, O, H, W).

    Args:
        weight: (O, C, 3, 3).
        size: (H, W).
    """
    n, channels, h, w = x.shape
    out_channels, (height, width) = weight.shape[0], size
    of_taps = weight.permute(2, 3, 0, 1).reshape(9 * out_channels, channels, 1, 1)
    products = F.conv2d(x, of_taps).view(n, 3, 3, out_channels, h, w)  # of every tap (row, column)
    # (N, O, row of the tap and the map, column of the tap and the map)
    products = products.permute(0, 3, 1, 4, 2, 5).reshape(n, out_channels, 3 * h, 3 * w)
    rows = _enlarge_and_shift(h, height, products, align_corners=align_corners)  # (H, 3h)
    columns = _enlarge_and_shift(w, width, products, align_corners=align_corners)  # (W, 3w)
    return rows @ products @ columns.t()


def _enlarge_and_shift(length: int, to: int, like: Tensor, *, align_corners: bool) -> Tensor:
    """(to, 3·length): from lines at the three taps of a kernel to the enlarged line under it, zeros at both ends."""
    eye = torch.eye(length, dtype=torch.promote_types(like.dtype, torch.float32))
    enlarge = F.interpolate(eye[None], size=to, mode="linear", align_corners=align_corners)[0].t()  # (to, length)
    padded = F.pad(enlarge, (0, 0, 1, 1))
    return torch.cat([padded[tap : tap + to] for tap in range(3)], dim=1).to(like.dtype)
