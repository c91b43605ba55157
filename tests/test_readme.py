"""README: every command in it is executed, at the smallest size, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme import blocks, check_links, commands

pytest.importorskip("detectron2", reason="README's chain trains Mask R-CNN")
pytest.importorskip("mmseg", reason="README's chain trains UperNet")
pytest.importorskip("skimage", reason="README's chain composes scenes from the photographs of scikit-image")

ROOT = Path(__file__).resolve().parent.parent

# What makes a command small enough for a test; the command itself stays as README has it.
SMALLER = {
    "tools/make_scenes.py": "--size 64 --unlabelled 8 --train 4 --val 4 --workers 0",
    "tools/pretrain.py": "train.epochs=null train.steps=2 train.batch_size=4 optim.warmup_epochs=0",
    "tools/train_cls.py": "train.epochs=null train.steps=2 train.batch_size=4 optim.warmup_epochs=0",
    "tools/train_det.py": "dataset.image_size=64 dataset.workers=0 train.max_iter=2 schedule.warmup_iters=1",
    "tools/train_seg.py": "dataset.crop_size=64 dataset.workers=0 train.max_iters=2 train.val_interval=2",
}
# Executed by .ci/run (make) or by tools/install.py as every `make` target calls it (pip).
BY_CI = ("make demo", "make test", "source .venv/bin/activate", "pip install -e '.[detection,segmentation]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout from inside, so that what the commands write lands elsewhere."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("tools", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_every_command_is_executed_and_leaves_what_readme_says(folder: Path) -> None:
    for command in commands(ROOT / "README.md"):
        if command in BY_CI:
            continue
        python, tool, *rest = shlex.split(command)
        assert python == "python", f"{command!r} is executed neither here nor by .ci/run"
        arguments = [sys.executable, "-W", "ignore", tool, *rest, *SMALLER.get(tool, "").split()]
        result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    for path in (
        "runs/reconstruction.png",
        "runs/encoder-for-detectron2.pth",
        "runs/detection/evaluation.json",
        "runs/classification/confusion.png",
    ):
        assert (folder / path).is_file(), path
    assert len(list((folder / "runs" / "predictions").rglob("*.png"))) >= 4
    for code in blocks(ROOT / "README.md", "python"):  # they read what the commands wrote
        result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{code}\n{result.stderr}"


def test_ci_executes_the_make_targets_and_the_extras_exist() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for target in ("lint", "test", "demo"):
        assert re.search(rf"^make {target}\b", script, re.MULTILINE)
        assert re.search(rf"^{target}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.search(r"\[(.*)\]", BY_CI[-1])
    assert extras is not None
    for extra in extras[1].split(","):
        assert f'"{extra}":' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    check_links(ROOT / page)
