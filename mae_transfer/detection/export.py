"""Backbone and pyramid of a detector as ONNX or torch.export: what ``tools/export.py`` runs for detection.

The input's normalisation is part of what is written, so that whoever runs it gives plain RGB pixels. What follows the
pyramid stays with Detectron2: its proposals and its boxes depend in number on what is in the image, read values off
tensors on the way (padding, non-maximum suppression, empty boxes), and torch.export refuses to. Detectron2's own
``TracingAdapter`` carries a whole detector through ``torch.jit.trace``, for images of one size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from mae_transfer.checkpoint.detectors import load_initial
from mae_transfer.detection.backbone import LEVELS
from mae_transfer.detection.config import load_config, settle_model
from mae_transfer.detection.predict import Predictor
from mae_transfer.engine.export import FORMATS, check_target, resize_tables, write_compared
from mae_transfer.errors import ConfigError


class FeatureExtractor(nn.Module):
    """The part of a detector that is exported: RGB pixels to the pyramid's levels.

    Args:
        detector: built by ``mask_rcnn``.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.register_buffer("pixel_mean", detector.pixel_mean.detach().clone())
        self.register_buffer("pixel_std", detector.pixel_std.detach().clone())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W), 0 to 255 in RGB, H and W multiples of ``backbone.size_divisibility`` -> p2 to p6."""
        levels = self.backbone((images - self.pixel_mean) / self.pixel_std)
        return tuple(levels[name] for name in LEVELS)


def load_detector_of(run: str | Path, overrides: Sequence[str] = ()) -> tuple[GeneralizedRCNN, int]:
    """The detector of a run's folder, of a checkpoint in one, or of a LazyConfig; and the side of its training images.

    A LazyConfig gives the weights of ``train.init_checkpoint``, or random ones.

    Raises:
        UserError: nothing there, or overrides to a run, whose config stands.
    """
    run = Path(run)
    if run.suffix != ".py":
        if overrides:
            raise ConfigError(f"{overrides[0]}: only a config takes overrides; {run} is exported as it was trained")
        predictor = Predictor(run, device="cpu")
        return predictor.model, predictor.augmentation.image_size
    cfg = load_config(run, overrides)
    settle_model(cfg, num_classes=1)  # the heads are not exported
    detector = instantiate(cfg.model).eval()
    if path := cfg.train.init_checkpoint:
        load_initial(detector, path)
    return detector, cfg.dataset.image_size


def export(detector: GeneralizedRCNN, path: str | Path, *, image_size: tuple[int, int], overwrite: bool = False) -> str:
    """Write backbone and pyramid to ``path`` and compare what it computes with PyTorch.

    Args:
        path: ends in ``.onnx`` or ``.pt2``. An ONNX file of more than 2 GB has its weights beside it, in
            ``path``.data.
        image_size: (H, W) that the file is for, in pixels; the number of images stays free.

    Returns:
        A line about the comparison.

    Raises:
        ConfigError: another ending, a file that is there, or a size that the pyramid cannot halve.
        MissingDependencyError: ONNX is not installed.
        RunFailed: what was written computes something else; nothing is left at ``path``.
    """
    path = check_target(path, overwrite=overwrite)
    # The pyramid's own multiple: a square that training pads to is no condition of the network.
    multiple = detector.backbone.pyramid.size_divisibility
    if any(side < multiple or side % multiple for side in image_size):
        raise ConfigError(f"image size {image_size[0]}x{image_size[1]}: expected multiples of {multiple}")
    reference = FeatureExtractor(detector).eval()
    extractor = copy.deepcopy(reference)
    resize_tables(extractor.backbone.net, image_size)
    images = 255 * torch.rand(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    checked = write_compared(
        extractor,
        path,
        images,
        reference=reference,
        outputs=LEVELS,
        metadata={"images": "RGB, 0 to 255", "strides": "4 8 16 32 64"},
    )
    return f"{path}: {FORMATS[path.suffix]}, RGB pixels (N, 3, {image_size[0]}, {image_size[1]}) -> p2 to p6; {checked}"


def export_run(
    run: str | Path, path: Path, *, image_size: tuple[int, int] | None, overwrite: bool, overrides: Sequence[str]
) -> str:
    """``export`` of ``load_detector_of``, for the square of training where no image size is given."""
    detector, side = load_detector_of(run, overrides)
    return export(detector, path, image_size=image_size or (side, side), overwrite=overwrite)
