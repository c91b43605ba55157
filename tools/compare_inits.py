"""Compare initial encoders by what a training makes of them; see --help."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the packages, not tools/pretrain.py under their name

from mae_transfer.errors import run_tool  # noqa: E402
from mae_transfer.study.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
