"""Write a detector's features or a segmentation model as ONNX or torch.export; see --help."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the packages, not tools/pretrain.py under their name

from mae_transfer.errors import run_tool  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Import the framework only when it is run, so that its absence is one line."""
    from mae_transfer.export import main as export

    return export(argv)


if __name__ == "__main__":
    sys.exit(run_tool(main))
