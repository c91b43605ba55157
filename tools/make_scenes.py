"""Compose demo data from photographs that lie inside two wheels: see --help."""

import sys

from mae_transfer.errors import run_tool
from mae_transfer.scenes import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
