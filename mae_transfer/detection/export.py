"""Backbone and pyramid of a detector as ONNX or torch.export: what ``tools/export.py`` runs.

The input's normalisation is part of what is written, so that whoever runs it gives plain RGB pixels. What follows the
pyramid stays with Detectron2: its proposals and its boxes depend in number on what is in the image, read values off
tensors on the way (padding, non-maximum suppression, empty boxes), and torch.export refuses to. Detectron2's own
``TracingAdapter`` carries a whole detector through ``torch.jit.trace``, for images of one size.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from mae_transfer.attention import Attention, WindowAttention
from mae_transfer.checkpoint.detectors import load_initial
from mae_transfer.detection.backbone import LEVELS
from mae_transfer.detection.config import load_config, settle_model
from mae_transfer.detection.predict import Predictor
from mae_transfer.errors import ConfigError, RunFailed, require
from mae_transfer.position import grid_of, resize_bias_table, resize_decomposed, resize_pos_embed
from mae_transfer.vit import VisionTransformer

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
#: Largest difference to PyTorch's own features that a written file may have, relative to the largest value of a level.
TOLERANCE = 1e-3


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


def resize_tables(net: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Bring the encoder's position tables to the grid of images of (H, W) pixels, in place.

    What is exported would resize them in every run, and runtimes do not agree on bicubic to more than two digits.
    """
    grid = grid_of(image_size, net.patch_size)
    net.pos_embed = nn.Parameter(resize_pos_embed(net.pos_embed.detach(), net.grid, grid))
    net.image_size, net.grid = image_size, grid
    for block in net.blocks:
        attention = block.attn
        assert isinstance(attention, Attention)
        if isinstance(attention, WindowAttention) or attention.relative is None:
            continue  # a window is of one size
        if attention.relative == "decomposed":
            for name, length in (("rel_pos_h", grid[0]), ("rel_pos_w", grid[1])):
                table = getattr(attention, name).detach()
                setattr(attention, name, nn.Parameter(resize_decomposed(table, 2 * length - 1)))
        else:
            assert attention.table_grid is not None
            table = attention.relative_position_bias_table.detach()
            attention.relative_position_bias_table = nn.Parameter(resize_bias_table(table, attention.table_grid, grid))
        attention.table_grid = grid


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
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} should end in {' or '.join(f'{end} ({name})' for end, name in FORMATS.items())}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists and is left as it is; give another name, or --overwrite")
    # The pyramid's own multiple: a square that training pads to is no condition of the network.
    multiple = detector.backbone.pyramid.size_divisibility
    if any(side < multiple or side % multiple for side in image_size):
        raise ConfigError(f"image size {image_size[0]}x{image_size[1]}: expected multiples of {multiple}")
    reference = FeatureExtractor(detector).eval()
    extractor = copy.deepcopy(reference)
    resize_tables(extractor.backbone.net, image_size)
    images = 255 * torch.rand(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _quiet():
        program = torch.export.export(extractor, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        with _written_whole(path) as temporary:
            if path.suffix == ".pt2":
                torch.export.save(program, temporary)
                runs = torch.export.load(temporary).module()
                checked = _compare(reference, lambda x: runs(x), images, "torch.export")
            else:
                _write_onnx(program, temporary)
                checked = _check_onnx(reference, temporary, images)
    return f"{path}: {FORMATS[path.suffix]}, RGB pixels (N, 3, {image_size[0]}, {image_size[1]}) -> p2 to p6; {checked}"


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        require(package, "export")
    written = torch.onnx.export(
        program, input_names=["images"], output_names=list(LEVELS), dynamo=True, verbose=False, optimize=True
    )
    assert written is not None
    written.model.metadata_props.update({"images": "RGB, 0 to 255", "strides": "4 8 16 32 64"})
    written.save(str(path))


def _check_onnx(reference: FeatureExtractor, path: Path, images: Tensor) -> str:
    try:
        import onnxruntime
    except ImportError:
        return "not compared with PyTorch: onnxruntime is not installed (pip install -e '.[export]')"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> list[Tensor]:
        return [torch.from_numpy(level) for level in session.run(None, {"images": batch.numpy()})]

    return _compare(reference, run, images, f"onnxruntime {onnxruntime.__version__}")


def _compare(reference: FeatureExtractor, run: Any, images: Tensor, name: str) -> str:
    """Features of one image and of two, by both; raise where they differ."""
    worst = 0.0
    for batch in (images, images[:1]):
        for expected, got in zip(reference(batch), run(batch), strict=True):
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
    if not worst <= TOLERANCE:
        raise RunFailed(f"{name} computes features that differ from PyTorch's by {worst:.1g} of their largest value")
    return f"{name} differs from PyTorch by at most {worst:.1g} of a level's largest value"


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A place to write ``path`` to, moved there when the block ends well; with the weights that ONNX puts beside it."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        yield folder / path.name
        for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the file itself last
            written.replace(path.parent / written.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters log and warn of their own parts, none of which a user of this tool chooses."""
    names = ("torch.__trace", "torch.onnx", "onnxscript", "onnx_ir", "torch.fx._symbolic_trace", "torch.export")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load and export; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Write a detector's backbone and pyramid as ONNX or torch.export, and compare it with PyTorch. "
        "Input: RGB pixels, 0 to 255; the normalisation is inside. The heads stay with Detectron2, whose proposals and "
        "boxes torch.export cannot follow.",
    )
    parser.add_argument("run", metavar="RUN_OR_CONFIG", help="a run's folder, a .pth in it, or a LazyConfig .py")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .onnx or .pt2 (torch.export)")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels; by default the square of training"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of a LazyConfig")
    args = parser.parse_intermixed_args(argv)
    detector, side = load_detector_of(args.run, args.overrides)
    height, width = args.image_size or (side, side)
    print(export(detector, args.out, image_size=(height, width), overwrite=args.overwrite))
    return 0
