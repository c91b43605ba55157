"""Spoilt data sets: a clear report from the check and from training, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import DefaultScope

from mae_transfer.check_dataset import main as check
from mae_transfer.errors import run_tool
from mae_transfer.segmentation.dataset import LabelledImages
from mae_transfer.segmentation.settings import DatasetSettings
from mae_transfer.segmentation.source import class_names, splits_of
from mae_transfer.segmentation.train import main as train

from .malformed import REFUSED, REPAIRED, SIZE, Spoilt, mask

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "segmentation" / "upernet_tiny.py"
SMALL = {"dataset.crop_size": "64", "dataset.workers": "1", "train.max_iters": "3", "train.batch_size": "2"}


@pytest.fixture
def root(make_folder: Callable[..., Path]) -> Path:
    return make_folder(num_train=2, num_val=1, size=SIZE)


def options_of(spoilt: Spoilt, root: Path) -> dict[str, str]:
    options = {key: value.replace("ROOT", str(root)) for key, value in spoilt.options.items()}
    if "masks" not in options and "colours" not in options:
        options["reduce_zero_label"] = "False"
    return options


def check_words(spoilt: Spoilt, root: Path) -> list[str]:
    words = [str(root)]
    for key, value in options_of(spoilt, root).items():
        if key == "reduce_zero_label":
            words.append("--no-reduce-zero-label")
        else:
            words += [f"--{'split' if key == 'train_split' else key.replace('_', '-')}", value]
    return words


def train_words(spoilt: Spoilt, root: Path) -> list[str]:
    dataset = {f"dataset.{key}": value for key, value in {"root": str(root), **options_of(spoilt, root)}.items()}
    words = [f"{key}={value}" for key, value in {**SMALL, **dataset}.items()]
    return [str(TINY), "--work-dir", str(root.parent / "run"), "--cfg-options", *words]


def test_there_are_enough() -> None:
    assert len(REFUSED) >= 40


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_refused_is_named_by_the_check(root: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    REFUSED[how].spoil(root)
    assert run_tool(check, check_words(REFUSED[how], root)) == 2
    printed = "".join(capsys.readouterr())
    assert REFUSED[how].message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("how", [how for how in REFUSED if how != "image of noise"])
def test_training_refuses_it_before_it_begins(root: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    REFUSED[how].spoil(root)
    assert run_tool(train, train_words(REFUSED[how], root)) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("error: ")
    assert REFUSED[how].message in printed
    assert not list((root.parent / "run").glob("*.p*"))


@pytest.mark.parametrize("how", REPAIRED)
def test_what_is_repaired_is_said_and_read(root: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    REPAIRED[how].spoil(root)
    assert run_tool(check, check_words(REPAIRED[how], root)) == 0
    assert REPAIRED[how].message in capsys.readouterr().out
    given: dict[str, Any] = options_of(REPAIRED[how], root)
    if "reduce_zero_label" in given:
        given["reduce_zero_label"] = False
    splits = splits_of(DatasetSettings(root=str(root), **given))
    pipeline = [{"type": "LoadPicture"}, {"type": "LoadLabels"}]
    with DefaultScope.overwrite_default_scope("mmseg"):
        samples = LabelledImages(
            **asdict(splits[0]), classes=class_names(splits, None), pipeline=pipeline, serialize_data=False
        )
    for index in range(2):
        sample = samples[index]
        assert sample["img"].shape == (*sample["gt_seg_map"].shape, 3)
        assert set(np.unique(sample["gt_seg_map"])) <= {0, 1, 2, 3, 255}


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(check, [str(tmp_path / "ade"), "--no-reduce-zero-label"]) == 2
    assert "ade is not a folder" in "".join(capsys.readouterr())
    (tmp_path / "ade").write_text("")
    assert run_tool(check, [str(tmp_path / "ade"), "--name", "cityscapes"]) == 2
    assert "ade is not a folder" in "".join(capsys.readouterr())
    (tmp_path / "folder").mkdir()
    assert run_tool(check, [str(tmp_path / "folder"), "images"]) == 2
    assert "a COCO json is named before its images" in capsys.readouterr().err


def test_every_problem_is_reported_not_only_the_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for how in ("label of no class", "image cut off", "RGBA"):
        (REFUSED | REPAIRED)[how].spoil(root)
    for how in ("mask of another size", "mask in equal channels"):
        (REFUSED | REPAIRED)[how].spoil(root)
    (root / "annotations/validation/scene_0.png").unlink()
    report = root.parent / "report.json"
    assert run_tool(check, [str(root), "--no-reduce-zero-label", "--json", str(report)]) == 2
    lines = capsys.readouterr().out.splitlines()
    problems = [line for line in lines if line.startswith(("refused", "repaired"))]
    assert [line.split(":")[0] for line in problems] == ["refused", "refused", "repaired"]
    assert lines[-1].endswith("2 refused, 1 repaired")
    entries = json.loads(report.read_text())
    assert [entry["what"] for entry in entries] == [
        "split validation",
        "mask that holds colours",
        "image with transparency",
    ]
    assert entries[1]["mask"] == str(mask(root))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["check_dataset.py", "train_seg.py"])
@pytest.mark.parametrize("how", ["classes too deep", "label of no class", "image cut off", "image of noise"])
def test_the_tools_end_with_status_2_and_no_traceback(root: Path, how: str, tool: str) -> None:
    REFUSED[how].spoil(root)
    words = (check_words if tool == "check_dataset.py" else train_words)(REFUSED[how], root)
    command = [sys.executable, str(ROOT / "tools" / tool), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert REFUSED[how].message in done.stdout + done.stderr
