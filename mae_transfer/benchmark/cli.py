"""The command line of ``tools/benchmark.py``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

# Each is a module here with add_arguments(parser) and run(arguments) -> exit status, imported when it is asked for.
BENCHMARKS = {
    "pretrain": "the pretraining step: ours, Hugging Face's ViTMAE, and the machine's matrix-product rate",
    "loader": "preparing images: our loader and a literal torchvision pipeline",
    "masking": "visible patches only against mask tokens in the encoder",
    "detection": "the detection backbone, training step, inference and memory: ours and Detectron2's ViTDet",
    "segmentation": "the segmentation backbone, training step, sliding windows and memory: ours and MMSegmentation's",
    "evaluation": "COCO evaluation: ours and pycocotools",
}


def parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the benchmark ``chosen`` only."""
    result = argparse.ArgumentParser(
        prog="tools/benchmark.py",
        description="Time ours and the peers in one run, taking turns; ratios come with their minimum and maximum.",
    )
    kinds = result.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, about in BENCHMARKS.items():
        sub = kinds.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if name == chosen:
            _module(name).add_arguments(sub)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if word in BENCHMARKS), None)
    arguments = parser(chosen).parse_args(words)
    status: int = _module(arguments.benchmark).run(arguments)
    return status


def _module(name: str) -> Any:
    return importlib.import_module(f"mae_transfer.benchmark.{name}")
