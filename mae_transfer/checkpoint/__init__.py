"""Checkpoints: recognise a family, read it safely, convert, report."""

from mae_transfer.checkpoint.build import SIZE_ARGUMENTS, host_conflict, vit_arguments, weights_arguments
from mae_transfer.checkpoint.files import atomic_write, write_safetensors, write_torch
from mae_transfer.checkpoint.info import IMAGENET_MEAN, IMAGENET_STD, EncoderInfo
from mae_transfer.checkpoint.load import (
    Report,
    build_backbone,
    describe,
    image_statistics,
    load_backbone,
    load_checkpoint,
)
from mae_transfer.checkpoint.names import encoder_state
from mae_transfer.checkpoint.read import Checkpoint, read_checkpoint

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SIZE_ARGUMENTS",
    "Checkpoint",
    "EncoderInfo",
    "Report",
    "atomic_write",
    "build_backbone",
    "describe",
    "encoder_state",
    "host_conflict",
    "image_statistics",
    "load_backbone",
    "load_checkpoint",
    "read_checkpoint",
    "vit_arguments",
    "weights_arguments",
    "write_safetensors",
    "write_torch",
]
