"""Runs of two processes (torchrun, gloo): the same as one, whatever the model is spread over, and gone on with by any
number."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mae_transfer.engine.metrics import read_metrics
from mae_transfer.segmentation.runner import read_checkpoint
from mae_transfer.segmentation.train import main as train_main
from tests.segmentation.conftest import write_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/segmentation/upernet_tiny.py")
# Dropout and drop path are on: two processes draw what two rounds of one do. GroupNorm knows nothing of batches; of
# maps of one pixel it makes signs, which rounding turns over: there is none.
OPTIONS = (
    *("dataset.crop_size=64", "dataset.resize=(160,64)", "dataset.workers=0", "dataset.reduce_zero_label=False"),
    *("head.channels=32", "head.aux_channels=32", "head.norm=gn", "head.dropout=0.1", "encoder.drop_path=0.1"),
    "head.pool_scales=2,3",
    *("train.max_iters=6", "train.val_interval=3", "train.batch_size=4", "train.precision=fp32", "train.lr=1e-4"),
    *("train.log_interval=1", "train.clip_grad=1.0", "train.ema=0.9", "head.loss=cross_entropy,dice"),
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*")]


def arguments(folder: Path, run: Path, *options: str, flags: Sequence[str] = ()) -> list[str]:
    return [CONFIG, "--work-dir", str(run), *flags, "--cfg-options", f"dataset.root={folder}", *OPTIONS, *options]


def launch(tool: str, command: Sequence[str]) -> subprocess.Popen[str]:
    """``tool`` in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    at = command.index("--cfg-options")
    return subprocess.Popen(
        [*launcher, str(ROOT / "tools" / tool), *command[:at], "--launcher", "pytorch", *command[at:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 240) -> str:
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"took too long: {process.communicate()[0]}") from error
    return said


def trained(folder: Path, run: Path, *options: str, flags: Sequence[str] = ()) -> Path:
    process = launch("train_seg.py", arguments(folder, run, *options, flags=flags))
    said = finish(process)
    assert process.returncode == 0, said[-4000:]
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "ade", num_train=6, num_val=3)


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, in two rounds."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert train_main(arguments(folder, run, "train.accumulate=2")) == 0
    return run


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    return trained(folder, run, f"train.distributed={request.param}")


def assert_same_run(run: Path, expected: Path) -> None:
    ours, theirs = read_metrics(run / "metrics.json"), read_metrics(expected / "metrics.json")
    assert [(line["step"], "mIoU" in line) for line in ours] == [(line["step"], "mIoU" in line) for line in theirs]
    assert len(ours) == 8
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            if name.endswith("time"):
                continue
            # A score is of labels, some of which are a hair's breadth from another.
            tolerance = {"abs": 0.5} if "mIoU" in a else {"rel": 1e-3}
            assert a[name] == pytest.approx(b[name], **tolerance), (name, a["step"])
    own, other = (read_checkpoint(path / "iter_6.pth") for path in (run, expected))
    for section in ("state_dict", "ema"):
        assert own[section].keys() == other[section].keys()
        for name, value in own[section].items():
            torch.testing.assert_close(value, other[section][name], rtol=1e-3, atol=5e-4, msg=name)
    assert own["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for index, moments in own["optimizer"]["state"].items():
        assert {name: value.shape for name, value in moments.items()} == {
            name: value.shape for name, value in other["optimizer"]["state"][index].items()
        }


def test_two_processes_train_as_one(one: Path, two: Path) -> None:
    assert_same_run(two, one)
    best = sorted(path.name for path in two.glob("best_*.pth"))
    assert best == sorted(path.name for path in one.glob("best_*.pth"))
    assert {path.parent.name for path in two.rglob("events.out.tfevents.*")} == {"tensorboard"}


def test_a_run_of_two_is_gone_on_with_by_one_and_the_reverse(folder: Path, one: Path, two: Path, tmp_path) -> None:
    for start, processes in ((two, 1), (one, 2)):
        run = tmp_path / f"run_{processes}"
        shutil.copytree(start, run)
        for path in (*run.glob("iter_6.pth"), *run.glob("best_*")):
            path.unlink()
        distributed = re.search(r"distributed='(\w+)'", next(two.glob("*.py")).read_text())
        assert distributed is not None
        if processes == 1:
            options = arguments(folder, run, "train.accumulate=2", flags=("--resume",))
            assert train_main(options) == 0
        else:
            trained(folder, run, f"train.distributed={distributed[1]}", flags=("--resume",))
        assert_same_run(run, one)


def test_two_processes_stop_on_a_signal_together_and_go_on(folder: Path, tmp_path: Path) -> None:
    """torchrun passes SIGTERM on; both save one checkpoint, and the next start needs no other."""
    run, options = tmp_path / "run", ("train.max_iters=40", "train.val_interval=40", "train.distributed=fsdp2")
    process = launch("train_seg.py", arguments(folder, run, *options))
    deadline = time.monotonic() + 120
    while not (run / "metrics.json").is_file() or not (run / "metrics.json").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    (saved,) = run.glob("iter_*.pth")
    assert int(saved.stem.split("_")[1]) % 10 == 0, "where they ask one another"
    assert f"saved {saved.name}" in said
    steps = [line["step"] for line in read_metrics(run / "metrics.json")]
    assert steps == list(range(1, int(saved.stem.split("_")[1]) + 1))
    trained(folder, run, *options, flags=("--resume",))
    steps = [line["step"] for line in read_metrics(run / "metrics.json") if "loss" in line]
    assert steps == list(range(1, 41))


@pytest.mark.parametrize("flags", [(), ("--tta",)])
def test_two_processes_test_as_one(folder: Path, one: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Three images on two processes: one of them is looked at twice and counts once."""
    config, checkpoint = str(next(one.glob("*.py"))), str(one / "iter_6.pth")
    scores = []
    for name in ("alone", "together"):
        command = [config, checkpoint, "--work-dir", str(tmp_path / name), "--out", str(tmp_path / f"{name}_labels")]
        command += [*flags, "--cfg-options", "test.scales=0.5,1.0"]
        if name == "alone":
            tool = [sys.executable, str(ROOT / "tools/test_seg.py"), *command]
            said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        else:
            process = launch("test_seg.py", command)
            said = finish(process)
            assert process.returncode == 0, said[-4000:]
        scores.append(re.findall(r"^aAcc [\d.]+, mIoU [\d.]+, mAcc [\d.]+", said, flags=re.MULTILINE))
        assert len(list((tmp_path / f"{name}_labels").iterdir())) == 3
    assert scores[0] == scores[1] and len(scores[0]) == 1
