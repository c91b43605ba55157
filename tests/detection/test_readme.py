"""configs/detection/README.md: the commands in its blocks are executed, at the smallest size; links lead somewhere."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.detection.conftest import Scenes
from tests.pictures import write_pictures
from tests.readme import blocks, check_links, commands, run

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "configs" / "detection" / "README.md"
_TRAINING = (
    *("dataset.image_size=64", "dataset.val.max_size=null", "train.max_iter=2", "train.eval_period=1"),
    *("schedule.warmup_iters=1", "model.channels=32", "model.rois_per_image=8", "train.pictures=1"),
)
# What makes a command small enough for a test; the command itself stays as README has it.
SMALLER = {
    "tools/pretrain.py": ("train.epochs=null", "train.steps=2", "train.batch_size=4", "optim.warmup_epochs=0"),
    "tools/compare_inits.py": ("--seeds", "0", "--fractions", "1", *_TRAINING),
    "tools/check_dataset.py": (),
}


@pytest.mark.slow
def test_every_command_is_executed(tmp_path: Path) -> None:
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    data = tmp_path / "datasets"
    write_pictures(data / "tiny-imagenet" / "unlabelled", 12)
    nuclei = data / "nuclei-dsb2018"
    (nuclei / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        scenes = Scenes(tmp_path / part, num_images=4, side=128)
        shutil.move(scenes.images, nuclei / part)
        shutil.move(scenes.json, nuclei / "annotations" / f"instances_{part}.json")
    tiles, *others = sorted(blocks(README, "python"), key=lambda code: "tiles" not in code)
    run([sys.executable, "-c", tiles], tmp_path)
    assert len(commands(README)) >= 4
    for command in commands(README):
        python, tool, *rest = shlex.split(command)
        assert python == "python", command
        run([sys.executable, tool, *rest, *SMALLER[tool]], tmp_path)
    comparison = tmp_path / "runs" / "compare"
    assert (comparison / "curves.png").is_file()
    (tmp_path / "runs" / "detection").symlink_to(comparison / "runs" / "1" / "random" / "seed-0")
    (tmp_path / "image.jpg").symlink_to(next((nuclei / "val").iterdir()))
    for code in others:
        run([sys.executable, "-c", code], tmp_path)


def test_links_lead_somewhere() -> None:
    check_links(README)
