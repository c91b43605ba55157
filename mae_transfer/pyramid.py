"""Feature pyramids of strides 4, 8, 16, 32 from a transformer's single-scale maps.

``FourTapPyramid`` (Li et al. 2021, Section 2.1; the same module is MMSegmentation's Feature2Pyramid) rescales four
taps; ``SimpleFeaturePyramid`` (ViTDet, Section 3) rescales the last map four times. Scale factors follow from the
patch size, so the strides are the same whatever the patch.

Shapes: N batch, D width, (h, w) patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mae_transfer.errors import ConfigError
from mae_transfer.position import to_pair

STRIDES = (4, 8, 16, 32)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {
    "ln": LayerNorm2d,
    "gn": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "bn": nn.BatchNorm2d,
    "syncbn": nn.SyncBatchNorm,
}


def build_norm(name: str, num_channels: int) -> nn.Module:
    """A normalisation of (N, C, H, W) by name: "ln", "gn" (32 groups), "bn", "syncbn".

    Raises:
        ConfigError: no such norm.
    """
    if name not in NORMS:
        raise ConfigError(f"unknown norm {name!r}; norms are: {', '.join(NORMS)}")
    return NORMS[name](num_channels)


class ConvNorm(nn.Conv2d):
    """Convolution without bias, then a norm that is its child: the keys of ViTDet's released pyramids."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = build_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Pyramid(nn.Module):
    """What both pyramids share: the octave that the patch falls on, and the maps' scale factors.

    A patch that is no power of two (14, say) is served by resampling its maps bilinearly to the nearest power of two
    first; images are then padded to ``size_divisibility`` so that the resampled grid is whole.
    """

    def __init__(self, width: int, patch_size: int | tuple[int, int]) -> None:
        super().__init__()
        patch = to_pair(patch_size, "patch_size")
        if patch[0] != patch[1]:
            raise ConfigError(f"pyramids need square patches, got {patch[0]}x{patch[1]}")
        self.width = width
        self.patch = patch[0]
        self.base_stride = 2 ** round(math.log2(self.patch))
        #: Powers of two by which each level is larger (positive) or smaller (negative) than the base map.
        self.octaves = [int(math.log2(self.base_stride / stride)) for stride in STRIDES]
        #: Images whose sides are multiples of this give whole maps at every stride.
        self.size_divisibility = math.lcm(self.patch, STRIDES[-1])

    def to_base_stride(self, x: Tensor) -> Tensor:
        """(N, D, h, w) at the patch's stride -> the same at the nearest power of two."""
        if self.base_stride == self.patch:
            return x
        height, width = x.shape[2] * self.patch, x.shape[3] * self.patch
        if height % self.base_stride or width % self.base_stride:
            raise ConfigError(
                f"maps of {x.shape[2]}x{x.shape[3]} patches of {self.patch} px do not resample to whole maps of stride "
                f"{self.base_stride}; pad images to multiples of {self.size_divisibility}"
            )
        size = (height // self.base_stride, width // self.base_stride)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def upsample(octaves: int, channels: Sequence[int], norm: str) -> list[nn.Module]:
    """Transposed 2×2 convolutions, norm and GELU between two of them; ``channels`` has octaves + 1 entries."""
    assert len(channels) == octaves + 1
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        if layers:
            layers += [build_norm(norm, before), nn.GELU()]
        layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
    return layers


def rescale(octaves: int, channels: Sequence[int], norm: str) -> list[nn.Module]:
    """Layers that double ``octaves`` times, or halve ``-octaves`` times by max pooling."""
    if octaves > 0:
        return upsample(octaves, channels, norm)
    if octaves == 0:
        return []
    side = 2**-octaves
    return [nn.MaxPool2d(kernel_size=side, stride=side)]


class FourTapPyramid(Pyramid):
    """Four taps of the encoder to strides 4, 8, 16, 32, width kept (Li et al. 2021, Section 2.1).

    For patch 16: ConvT–norm–GELU–ConvT, ConvT, identity, max pooling.
    """

    def __init__(self, width: int, patch_size: int | tuple[int, int], *, norm: str = "gn") -> None:
        super().__init__(width, patch_size)
        self.levels = nn.ModuleList(
            nn.Sequential(*rescale(octaves, [width] * (octaves + 1), norm)) for octaves in self.octaves
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (N, D, h, w), first tap first -> four maps (N, D, h·p/s, w·p/s), s = 4, 8, 16, 32."""
        if len(maps) != len(STRIDES):
            raise ConfigError(f"the four-tap pyramid was given {len(maps)} maps; expected {len(STRIDES)}")
        return [level(self.to_base_stride(x)) for level, x in zip(self.levels, maps, strict=True)]


class SimpleFeaturePyramid(Pyramid):
    """The last map to strides 4, 8, 16, 32 (ViTDet, Section 3); keys ``simfp_2`` … ``simfp_5`` as in its releases.

    For patch 16: ×4 ConvT(D→D/2)–norm–GELU–ConvT(→D/4), ×2 ConvT(→D/2), ×1, ×½ max pooling; each then a 1×1 and a 3×3
    convolution to ``out_channels`` with norms.
    """

    def __init__(
        self, width: int, patch_size: int | tuple[int, int], *, out_channels: int = 256, norm: str = "ln"
    ) -> None:
        super().__init__(width, patch_size)
        self.out_channels = out_channels
        self.stage_names: list[str] = []
        for stride, octaves in zip(STRIDES, self.octaves, strict=True):
            channels = [width // 2**step for step in range(max(octaves, 0) + 1)]
            stage = nn.Sequential(
                *rescale(octaves, channels, norm),
                ConvNorm(channels[-1], out_channels, 1, norm),
                ConvNorm(out_channels, out_channels, 3, norm),
            )
            self.stage_names.append(f"simfp_{int(math.log2(stride))}")
            self.add_module(self.stage_names[-1], stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, D, h, w) -> four maps (N, out_channels, h·p/s, w·p/s), s = 4, 8, 16, 32."""
        x = self.to_base_stride(x)
        return [self.get_submodule(name)(x) for name in self.stage_names]
