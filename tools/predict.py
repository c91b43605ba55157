"""Predict on images with a trained detection or segmentation run; see --help."""

import sys
from collections.abc import Sequence

from mae_transfer.errors import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    from mae_transfer.predict import main as predict

    return predict(argv)


if __name__ == "__main__":
    sys.exit(run_tool(main))
