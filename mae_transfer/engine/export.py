"""Networks as ONNX or torch.export files that were compared with PyTorch before they are kept."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mae_transfer.attention import Attention, WindowAttention
from mae_transfer.errors import ConfigError, RunFailed, require
from mae_transfer.position import grid_of, resize_bias_table, resize_decomposed, resize_pos_embed
from mae_transfer.vit import VisionTransformer

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
#: Largest difference to PyTorch's own results that a written file may have, relative to an output's largest value.
TOLERANCE = 1e-3


def check_target(path: str | Path, *, overwrite: bool) -> Path:
    """``path``, if a network can be written to it.

    Raises:
        ConfigError: an ending that names no format, or a file that is there.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} should end in {' or '.join(f'{end} ({name})' for end, name in FORMATS.items())}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists and is left as it is; give another name, or --overwrite")
    return path


def resize_tables(net: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Bring the encoder's position tables to the grid of images of (H, W) pixels, in place.

    What is exported would resize them in every run, and runtimes do not agree on bicubic to more than two digits.
    """
    grid = grid_of(image_size, net.patch_size)
    if net.pos_embed is not None:
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


def write_compared(
    network: nn.Module,
    path: Path,
    images: Tensor,
    *,
    reference: nn.Module,
    outputs: Sequence[str],
    metadata: Mapping[str, str],
) -> str:
    """Write a network to ``path`` and compare what the file computes with PyTorch.

    Args:
        network: takes images (N, 3, H, W) and returns a tuple of tensors.
        path: see ``check_target``. An ONNX file of more than 2 GB has its weights beside it, in ``path``.data.
        images: at least two, of the size that the file is for; how many there are stays free.
        reference: what the file is compared with, on all images and on the first alone.
        outputs: names of the results, in ONNX.
        metadata: entries of the ONNX file.

    Returns:
        A line about the comparison.

    Raises:
        MissingDependencyError: ONNX is not installed.
        RunFailed: what was written computes something else; nothing is left at ``path``.
    """
    with torch.no_grad(), _quiet():
        program = torch.export.export(network, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        with _written_whole(path) as temporary:
            if path.suffix == ".pt2":
                torch.export.save(program, temporary)
                return _compare(reference, torch.export.load(temporary).module(), images, "torch.export")
            _write_onnx(program, temporary, outputs, metadata)
            return _check_onnx(reference, temporary, images)


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], metadata: Mapping[str, str]
) -> None:
    for package in ("onnx", "onnxscript"):
        require(package, "export")
    written = torch.onnx.export(
        program, input_names=["images"], output_names=list(outputs), dynamo=True, verbose=False, optimize=True
    )
    assert written is not None
    written.model.metadata_props.update(metadata)
    written.save(str(path))


def _check_onnx(reference: nn.Module, path: Path, images: Tensor) -> str:
    try:
        import onnxruntime
    except ImportError:
        return "not compared with PyTorch: onnxruntime is not installed (pip install -e '.[export]')"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"images": batch.numpy()})]

    return _compare(reference, run, images, f"onnxruntime {onnxruntime.__version__}")


def _compare(reference: nn.Module, run: Callable[[Tensor], Sequence[Tensor]], images: Tensor, name: str) -> str:
    worst = 0.0
    for batch in (images, images[:1]):
        for expected, got in zip(reference(batch), run(batch), strict=True):
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
    if not worst <= TOLERANCE:
        raise RunFailed(f"{name} computes results that differ from PyTorch's by {worst:.1g} of their largest value")
    return f"{name} differs from PyTorch by at most {worst:.1g} of an output's largest value"


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
