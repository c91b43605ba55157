"""configs/segmentation/README.md: its commands are executed, at the smallest size; links lead somewhere; every config
is in its table."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.vit import build_vit
from tests.pictures import write_pictures
from tests.readme import blocks, check_links, commands, run
from tests.segmentation.conftest import write_folder

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "configs" / "segmentation" / "README.md"
_TRAINING = (
    *("dataset.crop_size=32", "dataset.workers=0", "head.channels=16", "head.aux_channels=16"),
    *(
        "train.max_iters=2",
        "train.batch_size=2",
        "train.val_interval=1",
        "train.log_interval=1",
        "train.warmup_iters=0",
    ),
)
# What makes a command small enough for a test; the command itself stays as README has it.
SMALLER = {
    "tools/pretrain.py": ("train.epochs=null", "train.steps=2", "train.batch_size=4", "optim.warmup_epochs=0"),
    "tools/train_seg.py": _TRAINING,
    "tools/compare_inits.py": ("--seeds", "0", "--fractions", "1", *_TRAINING),
}


@pytest.mark.slow
def test_every_command_is_executed(tmp_path: Path) -> None:
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("mine", "facade-ade"):
        write_folder(tmp_path / "datasets" / name)
    for name in ("tiny-imagenet/unlabelled", "facade-ade/images/unlabelled"):
        write_pictures(tmp_path / "datasets" / name, 12)
    write_pictures(tmp_path / "photographs", 2)
    encoder = build_vit("tiny", patch_size=8, image_size=32)
    write_safetensors(tmp_path / "encoder.safetensors", encoder.state_dict(), describe(encoder).to_metadata())
    tiles, *others = sorted(blocks(README, "python"), key=lambda code: "tiles" not in code)
    run([sys.executable, "-c", tiles], tmp_path)
    assert len(commands(README)) >= 5
    for command in commands(README):
        python, tool, *rest = shlex.split(command.replace("iter_600", "iter_2"))
        assert python == "python", command
        run([sys.executable, tool, *rest, *SMALLER.get(tool, ())], tmp_path)
    assert list((tmp_path / "predictions").glob("*_labels.png"))
    (tmp_path / "image.jpg").symlink_to(next((tmp_path / "photographs").iterdir()))
    for code in others:
        if "custom_imports" not in code:  # a config: tests/segmentation/test_own_config.py builds it
            run([sys.executable, "-c", code], tmp_path)


def test_links_lead_somewhere() -> None:
    check_links(README)


def test_every_config_is_in_the_table() -> None:
    listed = re.findall(r"^\| \[(\S+\.py)\]\(\1\) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in README.parent.glob("*.py"))
