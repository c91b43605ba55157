"""pretrain/README.md: every command in it is executed, at the smallest size, and every link leads somewhere."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS
from tests.readme import check_links, commands, run

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "pretrain" / "README.md"
SMALLER = {
    "tools/pretrain.py": " ".join([*ARGUMENTS, "train.epochs=null", "train.steps=20"]),
    "pretrain": "--size tiny --image-size 32 --patch-size 16 --batch-size 2 --rounds 1 --threads 1"
    " --contestants ours-bf16 hf-bf16",
    "masking": "--size tiny --image-size 32 --batch-size 2 --decoder-depth 1 --rounds 1 --threads 1",
    "loader": "--batch-size 2 --rounds 1 --batches 1 --image-size 32 --repeats 1",
}


@pytest.mark.slow
def test_every_command_is_executed(tmp_path: Path) -> None:
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_pictures(tmp_path / "datasets" / "unlabelled", 12)
    assert len(commands(README)) >= 5
    for command in commands(README):
        program, *rest = shlex.split(command)
        if program == "torchrun":
            line = [sys.executable, "-m", "torch.distributed.run", *rest]
        else:
            assert program == "python", command
            line = [sys.executable, *rest]
        smaller = SMALLER["tools/pretrain.py"] if "tools/pretrain.py" in rest else SMALLER[rest[1]]
        if "--plan" in rest:  # asks formulae: small already
            smaller = ""
        run([*line, *smaller.split()], tmp_path)
    for name in ("mine", "two"):
        assert (tmp_path / "runs" / name / "encoder.safetensors").is_file()


@pytest.mark.parametrize("page", [README, ROOT / "configs" / "pretrain" / "README.md"])
def test_links_lead_somewhere(page: Path) -> None:
    check_links(page)
