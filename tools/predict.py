"""Predict on images with a trained detection or segmentation run; see --help."""

import sys

from mae_transfer.errors import run_tool


def main(argv: list[str] | None = None) -> int:
    from mae_transfer.predict import main as predict

    return predict(argv)


if __name__ == "__main__":
    sys.exit(run_tool(main))
