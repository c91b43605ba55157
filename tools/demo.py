"""The whole chain in about ten minutes, ending in one HTML page: see --help."""

import sys

from mae_transfer.demo import main
from mae_transfer.errors import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
