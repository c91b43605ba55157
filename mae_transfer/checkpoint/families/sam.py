"""SAM's image encoder, which is ViTDet's: windows, decomposed tables, positions of patches alone, no cls token."""

from __future__ import annotations

from mae_transfer.checkpoint.families.base import Converted, Family, Raw, config_fields, need, rename, with_cls_row
from mae_transfer.checkpoint.families.plain import ANCHOR
from mae_transfer.errors import CheckpointError

_P = r"(weight|bias)"
_NAMES = [
    (r"pos_embed", "pos_embed"),
    (rf"patch_embed\.proj(?:ection)?\.{_P}", r"patch_embed.proj.\1"),
    (rf"(?:blocks|layers)\.(\d+)\.(?:norm|layer_norm)([12])\.{_P}", r"blocks.\1.norm\2.\3"),
    (rf"(?:blocks|layers)\.(\d+)\.attn\.(qkv|proj)\.{_P}", r"blocks.\1.attn.\2.\3"),
    (r"(?:blocks|layers)\.(\d+)\.attn\.(rel_pos_[hw])", r"blocks.\1.attn.\2"),
    (rf"(?:blocks|layers)\.(\d+)\.mlp\.(?:lin|fc)([12])\.{_P}", r"blocks.\1.mlp.fc\2.\3"),
    (r"neck\..*", ""),  # SAM's own, behind the encoder
]


def convert_sam(raw: Raw) -> Converted:
    """The blocks; which of them attend in windows, and of what side, is read off their tables."""
    tensors, left_out = rename(raw.tensors, _NAMES)
    table = need(tensors, "pos_embed", raw.path)  # (1, h, w, D)
    if table.ndim != 4:
        raise CheckpointError(f"{raw.path}: pos_embed is {tuple(table.shape)}; SAM's is (1, rows, columns, width)")
    _, h, w, width = table.shape
    tensors["pos_embed"] = with_cls_row(table.reshape(1, h * w, width))
    patch = need(tensors, ANCHOR, raw.path).shape[2:]
    rows = {
        int(name.split(".")[1]): tensor.shape[0] for name, tensor in tensors.items() if name.endswith("attn.rel_pos_h")
    }
    if not rows:
        raise CheckpointError(f"{raw.path}: no relative tables (attn.rel_pos_h); the file is damaged or incomplete")
    whole = 2 * h - 1
    windows = {(length + 1) // 2 for length in rows.values() if length != whole}
    if len(windows) > 1:
        raise CheckpointError(
            f"{raw.path}: relative tables of windows of several sides, {sorted(windows)}; SAM has one"
        )
    fields = {
        "image_size": (h * patch[0], w * patch[1]),
        "cls_token": False,
        "final_norm": False,
        "relative_position": "decomposed",
        "window_size": next(iter(windows), 0),
        "global_blocks": tuple(block for block in sorted(rows) if rows[block] == whole) if windows else (),
    }
    config = config_fields(raw.config)
    config.pop("image_size", None)  # the table says it
    return Converted(tensors=tensors, fields=fields | config, left_out=[*left_out, *raw.outside])


FAMILIES = (
    Family(
        name="sam",
        title="SAM's image encoder, official or timm's names",
        anchor=ANCHOR,
        convert=convert_sam,
        marks=(r"^pos_embed$", r"^blocks\.0\.attn\.rel_pos_h$", r"^neck\."),
        without=(r"^cls_token$",),
        license="apache-2.0",
    ),
    Family(
        name="hf-sam",
        title="Hugging Face SAM",
        anchor="patch_embed.projection.weight",
        convert=convert_sam,
        marks=(r"^pos_embed$", r"^layers\.0\.attn\.rel_pos_h$"),
        license="apache-2.0",
    ),
)
