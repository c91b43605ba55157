"""Formats in our own names: our backbone, the official MAE file, and those of detectors and segmenters."""

from __future__ import annotations

from collections.abc import Callable

from mae_transfer.checkpoint.formats.base import Exported, Format, Tensors, check_carried
from mae_transfer.checkpoint.formats.decoder import check_decoder, has_decoder
from mae_transfer.checkpoint.info import EncoderInfo
from mae_transfer.checkpoint.names import encoder_state


def _encoder(tensors: Tensors, info: EncoderInfo) -> Exported:
    return _below("")(tensors, info)


def _below(prefix: str) -> Callable[[Tensors, EncoderInfo], Exported]:
    def export(tensors: Tensors, info: EncoderInfo) -> Exported:
        encoder = encoder_state(tensors)
        return Exported(
            tensors={prefix + name: tensor for name, tensor in encoder.items()},
            left_out=[name for name in tensors if name not in encoder],
        )

    return export


def _official(tensors: Tensors, info: EncoderInfo) -> Exported:
    # A fine-tuned file has a norm of the averaged patches in place of the encoder's.
    carried = frozenset({"oblong", *(["no_norm"] if "fc_norm.weight" in tensors else [])})
    check_carried(tensors, info, title="the official MAE file", carried=carried)
    crosses = any(".cross_attn." in name for name in tensors)  # CrossMAE's decoder
    if has_decoder(tensors) and not crosses:
        check_decoder(tensors, info)
    return Exported(tensors=dict(tensors))


BACKBONE = Format(name="backbone", title="our encoder", export=_encoder, endings=(".safetensors",))
MAE = Format(name="mae", title="the official MAE file", export=_official, endings=(".pth",), decoder=True)
DETECTRON2 = Format(
    name="detectron2", title="Detectron2's ViT", export=_below("backbone.net."), endings=(".pth",), library="detectron2"
)
MMSEG = Format(
    name="mmseg",
    title="MMSegmentation's backbone",
    export=_below("backbone."),
    endings=(".pth",),
    key="state_dict",
    library="mmsegmentation",
)
