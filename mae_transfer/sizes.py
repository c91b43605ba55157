"""The five sizes, and what each recipe derives from them.

Every config (pretraining YAML, Detectron2 LazyConfig, mmengine) reads its numbers from here, so that width, depth and
the block lists that follow from them stand in one place. Published values: MAE (arXiv 2111.06377, Table 8 and 9),
Li et al. 2021 (arXiv 2111.11429), ViTDet (arXiv 2203.16527, Table 6 and 7), BEiT's ADE20K recipe as used by MAE.
"""

from __future__ import annotations

from dataclasses import dataclass

from mae_transfer.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Size:
    """One encoder with the decoder it is pretrained with, and its recipe numbers."""

    name: str
    width: int
    depth: int
    num_heads: int
    decoder_width: int
    decoder_depth: int
    decoder_num_heads: int
    patch_size: int = 16
    # Layer decay and drop path by task: each is the published value for b/l/h; tiny and small follow base.
    sfp_layer_decay: float = 0.7
    sfp_drop_path: float = 0.1
    sfp_epochs: int = 100
    fpn_drop_path: float = 0.1
    segmentation_layer_decay: float = 0.65
    segmentation_drop_path: float = 0.1
    finetune_layer_decay: float = 0.75
    finetune_drop_path: float = 0.1
    finetune_epochs: int = 100

    @property
    def quarter_blocks(self) -> tuple[int, ...]:
        """Last block of every quarter: tapped by the four-tap pyramid and global in windowed models; B: 2, 5, 8, 11."""
        return quarter_blocks(self.depth)

    @property
    def segmentation_taps(self) -> tuple[int, ...]:
        """BEiT's taps for UperNet: the last four of every ``depth / 6`` blocks; B: 3, 5, 7, 11; L: 7, 11, 15, 23.

        Raises:
            ConfigError: fewer than six blocks.
        """
        if self.depth < 6:
            raise ConfigError(f"four taps as in BEiT's UperNet need six blocks; this encoder has {self.depth}")
        third, sixth = self.depth // 3, self.depth // 6
        return (third - 1, third + sixth - 1, third + 2 * sixth - 1, self.depth - 1)


def quarter_blocks(depth: int) -> tuple[int, ...]:
    """0-based index of the last block of every quarter of ``depth`` blocks.

    Raises:
        ConfigError: fewer than four blocks.
    """
    if depth < 4:
        raise ConfigError(f"a model of {depth} blocks has no four quarters to tap; use at least 4 blocks")
    return tuple((quarter * depth) // 4 - 1 for quarter in (1, 2, 3, 4))


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size(name="tiny", width=192, depth=12, num_heads=3, decoder_width=128, decoder_depth=4, decoder_num_heads=4),
        Size(name="small", width=384, depth=12, num_heads=6, decoder_width=256, decoder_depth=4, decoder_num_heads=8),
        Size(name="base", width=768, depth=12, num_heads=12, decoder_width=512, decoder_depth=8, decoder_num_heads=16),
        Size(
            name="large",
            width=1024,
            depth=24,
            num_heads=16,
            decoder_width=512,
            decoder_depth=8,
            decoder_num_heads=16,
            sfp_layer_decay=0.8,
            sfp_drop_path=0.4,
            fpn_drop_path=0.3,
            segmentation_drop_path=0.2,
            finetune_epochs=50,
        ),
        Size(
            name="huge",
            width=1280,
            depth=32,
            num_heads=16,
            decoder_width=512,
            decoder_depth=8,
            decoder_num_heads=16,
            patch_size=14,
            sfp_layer_decay=0.9,
            sfp_drop_path=0.5,
            sfp_epochs=75,
            fpn_drop_path=0.3,
            segmentation_drop_path=0.2,
            finetune_drop_path=0.2,
            finetune_epochs=50,
        ),
    )
}


def get_size(name: str) -> Size:
    """The size called ``name``.

    Raises:
        ConfigError: no such size.
    """
    if name not in SIZES:
        guess = nearest(name, SIZES)
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"unknown size {name!r}{hint} Sizes are: {', '.join(SIZES)}")
    return SIZES[name]
