"""Classification: fine-tuning, partial fine-tuning, linear probe, k-nearest neighbours. See --help."""

import sys
from pathlib import Path

# Python puts this folder first on its path, where tools/pretrain.py would be found as the package "pretrain".
sys.path[0] = str(Path(__file__).resolve().parents[1])

from mae_transfer.classification.cli import main  # noqa: E402
from mae_transfer.errors import run_tool  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
