"""Train Mask R-CNN in Detectron2 on an MAE encoder; see --help."""

import sys
from collections.abc import Sequence

from mae_transfer.errors import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    from mae_transfer.detection.train import main as train

    return train(argv)


if __name__ == "__main__":
    sys.exit(run_tool(main))
