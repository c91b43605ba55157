"""``MAEViT``: the one encoder as MMSegmentation's backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmseg.registry import MODELS
from torch import Tensor

from mae_transfer.checkpoint import load_backbone
from mae_transfer.errors import ConfigError
from mae_transfer.layer_decay import freeze_blocks as freeze_encoder_blocks
from mae_transfer.sizes import get_size
from mae_transfer.vit import VisionTransformer, size_arguments


@MODELS.register_module()
class MAEViT(VisionTransformer):
    """VisionTransformer that returns four maps, with BEiT's transfer defaults (MAE, Appendix A.4).

    It *is* the encoder, so that its parameters are ``backbone.<key of the published checkpoint>``.

    Args:
        size: "tiny" … "huge"; any of VisionTransformer's arguments overrides what follows from it.
        image_size: training crop, in pixels; the relative-position tables span its grid.
        taps: blocks whose outputs are returned (0-based); by default BEiT's for the depth: B 3, 5, 7, 11.
        init_checkpoint: encoder file read by ``init_weights``; None keeps the random initialisation.
        relative_position, layer_scale: as in BEiT, beside the absolute embedding. There is no final norm.
        frozen: for probing: nothing is trained, dropping stays off, and no gradient goes through.
        freeze_blocks: the embeddings and so many blocks are not trained.
        **overrides: further arguments of VisionTransformer.
    """

    def __init__(
        self,
        size: str = "base",
        *,
        image_size: int | Sequence[int] = 512,
        taps: Sequence[int] | None = None,
        init_checkpoint: str | None = None,
        relative_position: str | None = "bias",
        layer_scale: float | None = 1.0,
        frozen: bool = False,
        freeze_blocks: int = 0,
        **overrides: Any,
    ) -> None:
        arguments: dict[str, Any] = {**size_arguments(size), **overrides}
        super().__init__(
            image_size=image_size if isinstance(image_size, int) else (image_size[0], image_size[1]),
            relative_position=relative_position,
            layer_scale=layer_scale,
            final_norm=False,
            **arguments,
        )
        if taps is None:
            if self.depth != get_size(size).depth:
                raise ConfigError(f"taps follow from the size's depth; name them for a model of {self.depth} blocks")
            taps = get_size(size).segmentation_taps
        self.taps = tuple(taps)
        self.init_checkpoint = init_checkpoint
        self.frozen = frozen
        if frozen:
            self.requires_grad_(False)
        freeze_encoder_blocks(self, depth=self.depth, num_blocks=freeze_blocks)

    def train(self, mode: bool = True) -> MAEViT:
        """Training mode; a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def init_weights(self) -> None:
        """Called by MMEngine's Runner before training: read ``init_checkpoint`` and log what was loaded.

        Raises:
            CheckpointError: the file does not hold this encoder.
        """
        if self.init_checkpoint is None:
            print_log("encoder: random weights (no init_checkpoint given)", logger="current")
            return
        report = load_backbone(self, self.init_checkpoint)
        print_log(f"encoder: {self.init_checkpoint}\n{report}", logger="current")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(N, C, H, W) of any size -> one (N, D, ⌈H/p⌉, ⌈W/p⌉) for every tap.

        A size that is not a whole number of patches is filled with zeros (the mean colour) at the bottom and right;
        ``MAESegmentor`` crops the corresponding logits away again.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return tuple(self.forward_taps(pad_to_patches(images, self.patch_size), self.taps))


def pad_to_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, C, H', W') with zeros at the bottom and right up to a whole number of patches."""
    pad_h, pad_w = -images.shape[2] % patch_size[0], -images.shape[3] % patch_size[1]
    if not pad_h and not pad_w:
        return images
    return F.pad(images, (0, pad_w, 0, pad_h))
