"""The paper's ablations at small scale: masking, target, decoder, partial fine-tuning. See --help."""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # the checkout, not tools/: tools/pretrain.py would shadow pretrain

from mae_transfer.errors import run_tool  # noqa: E402
from mae_transfer.study.ablation_cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool(main))
