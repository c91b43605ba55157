"""A whole segmentation model as ONNX or torch.export: what ``tools/export.py`` runs for segmentation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mae_transfer.engine.export import FORMATS, check_target, resize_tables, write_compared
from mae_transfer.errors import ConfigError
from mae_transfer.segmentation.config import load_config, read_options
from mae_transfer.segmentation.geometry import whole_maps
from mae_transfer.segmentation.predict import build_model, find_run
from mae_transfer.segmentation.runner import checkpoints_of
from mae_transfer.segmentation.segmentor import MAESegmentor


class Segmenter(nn.Module):
    """What is exported: RGB pixels to logits, for one window; sliding it is the caller's.

    Args:
        model: with SegDataPreProcessor's mean and std of RGB pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: MAESegmentor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", model.data_preprocessor.mean.detach().clone())  # (3, 1, 1)
        self.register_buffer("std", model.data_preprocessor.std.detach().clone())

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """(N, 3, H, W), 0 to 255 in RGB -> logits (N, classes, H, W)."""
        return (self.model.encode_decode((images - self.mean) / self.std, []),)


def export(
    model: MAESegmentor,
    path: str | Path,
    *,
    image_size: tuple[int, int],
    classes: Sequence[str],
    overwrite: bool = False,
) -> str:
    """Write encoder, neck and head to ``path`` and compare what it computes with PyTorch.

    Args:
        path: ends in ``.onnx`` or ``.pt2``. An ONNX file of more than 2 GB has its weights beside it, in
            ``path``.data.
        image_size: (H, W) that the file is for, in pixels; the number of images stays free.
        classes: names, in the order of the logits; ONNX files carry them.

    Returns:
        A line about the comparison.

    Raises:
        ConfigError: another ending, a file that is there, or no size.
        MissingDependencyError: ONNX is not installed.
        RunFailed: what was written computes something else; nothing is left at ``path``.
    """
    path = check_target(path, overwrite=overwrite)
    height, width = image_size
    if height < 1 or width < 1:
        raise ConfigError(f"image size {height}x{width}: expected two whole numbers above 0")
    reference = Segmenter(model.eval()).eval()
    segmenter = copy.deepcopy(reference)
    backbone = segmenter.model.backbone
    unit = whole_maps(backbone.patch_size[0])  # the model fills images up to whole maps
    resize_tables(backbone, (-(-height // unit) * unit, -(-width // unit) * unit))
    images = 255 * torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    checked = write_compared(
        segmenter,
        path,
        images,
        reference=reference,
        outputs=["logits"],
        metadata={"images": "RGB, 0 to 255", "classes": "\n".join(classes)},
    )
    return f"{path}: {FORMATS[path.suffix]}, RGB pixels (N, 3, {height}, {width}) -> logits; {checked}"


def load_model(run: str | Path, overrides: Sequence[str] = ()) -> tuple[MAESegmentor, Config]:
    """The model of a run's folder or of a checkpoint in one; or of a config, with its ``init_checkpoint``.

    Raises:
        UserError: nothing there, or overrides to a run, whose config stands.
    """
    path = Path(run)
    if path.suffix != ".py":
        if overrides:
            raise ConfigError(f"{overrides[0]}: only a config takes overrides; {run} is exported as it was trained")
        config, weights = find_run(path)
        return build_model(config, weights), config
    if checkpoints_of(path.parent):
        raise ConfigError(f"{path} lies in a run; name its folder, or the checkpoint, to export what was trained")
    config = load_config(path, read_options(overrides), work_dir=".")
    encoder = config.model.backbone.init_checkpoint
    model = build_model(config, None)
    model.backbone.init_checkpoint = encoder
    model.backbone.init_weights()
    return model, config


def export_run(
    run: str | Path, path: Path, *, image_size: tuple[int, int] | None, overwrite: bool, overrides: Sequence[str]
) -> str:
    """``export`` of a run's weights, or of a config with its ``init_checkpoint`` or random weights; of the test window
    where no image size is given.

    Raises:
        UserError: nothing there, or overrides to a run, whose config stands.
    """
    model, config = load_model(run, overrides)
    size = image_size or (config.model.test_cfg.crop_size[0], config.model.test_cfg.crop_size[1])
    return export(model, path, image_size=size, classes=config.facts.classes, overwrite=overwrite)
