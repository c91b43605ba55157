"""pretrain/README.md: every command in it is executed, at the smallest size, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "pretrain" / "README.md"
SMALLER = {
    "tools/pretrain.py": " ".join([*ARGUMENTS, "train.epochs=null", "train.steps=20"]),
    "pretrain": "--size tiny --image-size 32 --patch-size 16 --batch-size 2 --rounds 1 --threads 1"
    " --contestants ours-bf16 hf-bf16",
    "masking": "--size tiny --image-size 32 --batch-size 2 --decoder-depth 1 --rounds 1 --threads 1",
    "loader": "--batch-size 2 --rounds 1 --batches 1 --image-size 32 --repeats 1",
}


def commands() -> list[str]:
    fenced = re.findall(r"^```bash\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in fenced for line in block.splitlines() if line.strip()]


def test_every_command_is_executed(tmp_path: Path) -> None:
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_pictures(tmp_path / "datasets" / "unlabelled", 12)
    assert len(commands()) >= 5
    for command in commands():
        program, *rest = shlex.split(command)
        if program == "torchrun":
            line = [sys.executable, "-m", "torch.distributed.run", *rest]
        else:
            assert program == "python", command
            line = [sys.executable, *rest]
        smaller = SMALLER["tools/pretrain.py"] if "tools/pretrain.py" in rest else SMALLER[rest[1]]
        if "--plan" in rest:  # asks formulae: small already
            smaller = ""
        result = subprocess.run([*line, *smaller.split()], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    for run in ("mine", "two"):
        assert (tmp_path / "runs" / run / "encoder.safetensors").is_file()


@pytest.mark.parametrize("page", [README, ROOT / "configs" / "pretrain" / "README.md"])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
