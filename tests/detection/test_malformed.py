"""Spoilt data sets: a clear report from the check and from training, and no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mae_transfer.check_dataset import main as check
from mae_transfer.detection.dataset import load_coco
from mae_transfer.detection.train import main as train
from mae_transfer.errors import run_tool

from .malformed import REFUSED, REPAIRED

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "detection" / "tiny.py"
# Only what cannot be seen before an image is decoded gets as far as training.
SMALL = ["dataset.image_size=64", "dataset.workers=0", "train.max_iter=3", "schedule.warmup_iters=1"]


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=2, side=48)


def words(scenes: Any) -> list[str]:
    return [
        *("--config-file", str(TINY), f"dataset.train.json={scenes.json}", f"dataset.train.images={scenes.images}"),
        *(*SMALL, f"train.output_dir={scenes.json.parent / 'run'}"),
    ]


def test_there_are_enough() -> None:
    assert len(REFUSED) >= 30


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_refused_is_named_by_the_check(scenes: Any, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = REFUSED[how]
    spoil(scenes)
    assert run_tool(check, [str(scenes.json), str(scenes.images)]) == 2
    printed = "".join(capsys.readouterr())
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("how", [how for how in REFUSED if how != "image of noise"])
def test_training_refuses_it_before_it_begins(scenes: Any, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = REFUSED[how]
    spoil(scenes)
    assert run_tool(train, words(scenes)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert not (scenes.json.parent / "run").exists()


@pytest.mark.parametrize("how", REPAIRED)
def test_what_is_repaired_or_left_out_is_said(scenes: Any, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = REPAIRED[how]
    spoil(scenes)
    assert run_tool(check, [str(scenes.json), str(scenes.images)]) == 0
    printed = capsys.readouterr().out
    assert message in printed
    assert ("left out" in message) <= (len(load_coco(scenes.json, scenes.images).json_dict["annotations"]) == 7)


def test_every_problem_is_reported_not_only_the_first(scenes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for how in ("annotation of no category", "two points", "RGBA"):
        (REFUSED | REPAIRED)[how][0](scenes)
    scenes.content["annotations"][3]["category_id"] = 6
    scenes.content["annotations"][5]["bbox"] = [0, 0, 1, 1]
    scenes.write()
    report = scenes.json.parent / "report.json"
    assert run_tool(check, [str(scenes.json), str(scenes.images), "--json", str(report)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["refused", "refused", "repaired", "repaired"]
    assert lines[-1].endswith("2 refused, 2 repaired")
    assert '"annotation": 4' in report.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["check_dataset.py", "train_det.py"])
@pytest.mark.parametrize("how", ["json too deep", "annotation of no category", "JPEG cut off", "image of noise"])
def test_the_tools_end_with_status_2_and_no_traceback(scenes: Any, how: str, tool: str) -> None:
    spoil, message = REFUSED[how]
    spoil(scenes)
    arguments = [str(scenes.json), str(scenes.images)] if tool == "check_dataset.py" else words(scenes)
    command = [sys.executable, str(ROOT / "tools" / tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert message in done.stdout + done.stderr
