"""The one encoder as a Detectron2 backbone: four taps into an FPN (Li et al. 2021), or ViTDet's simple pyramid.

State-dict keys of the encoder are ``backbone.net.*`` in a Detectron2 model, as in ViTDet's releases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from mae_transfer.errors import ConfigError
from mae_transfer.pyramid import STRIDES, FourTapPyramid, SimpleFeaturePyramid
from mae_transfer.sizes import get_size, quarter_blocks
from mae_transfer.vit import VisionTransformer, build_vit

PYRAMIDS = ("sfp", "fpn")
LEVELS = ("p2", "p3", "p4", "p5", "p6")


class _Maps(Backbone):
    """What Detectron2's FPN takes for its bottom-up network: passes on maps that are already there."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._out_features = [f"tap{stride}" for stride in STRIDES]
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)
        self._out_feature_strides = dict(zip(self._out_features, STRIDES))

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return maps


class MAEBackbone(Backbone):
    """An encoder and a pyramid; features p2 to p6 at strides 4 to 64.

    Args:
        net: the encoder, built with ``cls_token=False, final_norm=False`` (neither would be used).
        pyramid: "sfp", the simple feature pyramid on the last map, or "fpn", four taps and Detectron2's FPN.
        out_channels: of every level.
        norm: of the pyramid's convolutions, in Detectron2's spelling ("LN", "GN", "SyncBN", "BN"). Between the
            transposed convolutions of the four-tap pyramid it is GroupNorm, as published.
        square_size: pad images to squares of this many pixels, as the recipes with large-scale jitter do; 0 for
            padding only to whole maps.
    """

    def __init__(
        self,
        net: VisionTransformer,
        *,
        pyramid: str = "sfp",
        out_channels: int = 256,
        norm: str = "LN",
        square_size: int = 0,
    ) -> None:
        super().__init__()
        self.net = net
        if pyramid == "sfp":
            self.taps: tuple[int, ...] = (net.depth - 1,)
            self.pyramid: SimpleFeaturePyramid | FourTapPyramid = SimpleFeaturePyramid(
                net.width, net.patch_size, out_channels=out_channels, norm=norm.lower()
            )
            self.top_block: nn.Module = LastLevelMaxPool()
        elif pyramid == "fpn":
            self.taps = quarter_blocks(net.depth)
            self.pyramid = FourTapPyramid(net.width, net.patch_size, norm="gn")
            maps = _Maps(net.width)
            self.fpn = FPN(maps, maps._out_features, out_channels, norm=norm, top_block=LastLevelMaxPool())
        else:
            raise ConfigError(f"model.pyramid={pyramid}: expected one of {', '.join(PYRAMIDS)}")
        self.kind = pyramid
        self._whole_maps: int = self.pyramid.size_divisibility
        multiple = self._whole_maps
        if square_size % multiple:
            raise ConfigError(f"images are padded to {square_size} px squares, which is no multiple of {multiple}")
        # A multiple of the whole square: an image up to the square is padded to just that, and a larger one to the
        # next multiple. Detectron2's own "square_size" would crop the larger one without a word.
        self._size_divisibility = square_size or multiple
        self._out_features = list(LEVELS)
        self._out_feature_channels = dict.fromkeys(LEVELS, out_channels)
        self._out_feature_strides = dict(zip(LEVELS, (*STRIDES, 2 * STRIDES[-1])))

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility, "square_size": 0}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) -> {"p2": (N, C, H/4, W/4), …}.

        Raises:
            ConfigError: H or W is not a multiple of what the pyramid needs. Detectron2's models pad their images by
                ``padding_constraints``; what calls the backbone itself must do so too.
        """
        multiple = self._whole_maps
        if images.shape[2] % multiple or images.shape[3] % multiple:
            raise ConfigError(
                f"the backbone was given images of {images.shape[2]}x{images.shape[3]} px; pad them to multiples of "
                f"{multiple} (detectron2.structures.ImageList.from_tensors with its padding_constraints does)"
            )
        maps = self.net.forward_taps(images, self.taps)
        if self.kind == "sfp":
            levels = self.pyramid(maps[0])
            levels += self.top_block(levels[-1])
        else:
            features = {f"tap{stride}": x for stride, x in zip(STRIDES, self.pyramid(maps))}
            levels = list(self.fpn(features).values())
        # RoIAlign rounds its boxes to the features' type: in bf16 the corner of a box at 200 px would move by up to
        # half a pixel. Under autocast the convolutions that follow cast down again themselves.
        return {name: level if level.dtype.itemsize >= 4 else level.float() for name, level in zip(LEVELS, levels)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in LEVELS
        }


def mae_backbone(
    *,
    size: str = "base",
    patch_size: int | None = None,
    image_size: int = 1024,
    position_size: int | None = None,
    pyramid: str = "sfp",
    out_channels: int = 256,
    norm: str = "LN",
    window_size: int = 14,
    global_blocks: Sequence[int] | None = None,
    relative_position: str | None = "decomposed",
    drop_path: float | None = None,
    square_size: int = 0,
    checkpointing: bool = False,
    encoder: Mapping[str, Any] | None = None,
) -> MAEBackbone:
    """An ``MAEBackbone`` by the name of its size; what is None follows from the size and the recipe.

    Args:
        image_size: side of the training images in pixels; the global blocks' relative tables span its grid.
        position_size: side in pixels whose grid ``pos_embed`` is kept at. ``image_size`` by default, so that nothing
            is interpolated in training; ViTDet keeps the pretraining's 224 and interpolates in every forward pass.
        window_size: in patches; 0 for global attention everywhere.
        global_blocks: blocks without windows; by default the last of every quarter.
        encoder: further arguments of ``VisionTransformer``, such as the layer scale of the checkpoint to be loaded, or
            its width and depth where ``size`` only names the recipe (``checkpoint.weights_arguments`` lists them).
    """
    numbers = get_size(size)
    own = dict(encoder or {})
    if drop_path is None:
        drop_path = numbers.sfp_drop_path if pyramid == "sfp" else numbers.fpn_drop_path
    if global_blocks is None:
        global_blocks = quarter_blocks(own.get("depth", numbers.depth)) if window_size else ()
    net = build_vit(
        size,
        patch_size=patch_size or numbers.patch_size,
        image_size=position_size or image_size,
        attention_image_size=image_size,
        final_norm=False,
        window_size=window_size,
        global_blocks=global_blocks,
        relative_position=relative_position,
        drop_path=drop_path,
        checkpointing=checkpointing,
        **{"cls_token": False, **own},
    )
    return MAEBackbone(net, pyramid=pyramid, out_channels=out_channels, norm=norm, square_size=square_size)
