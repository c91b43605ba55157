"""Time ours and the peers in one run. See --help."""

import sys
from pathlib import Path

# Python puts this folder first on its path, where pretrain.py would be found as the package "pretrain".
sys.path[0] = str(Path(__file__).resolve().parents[1])

from mae_transfer.benchmark.cli import main  # noqa: E402
from mae_transfer.errors import run_tool  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
