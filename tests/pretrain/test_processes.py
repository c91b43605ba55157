"""Runs of two processes (torchrun, gloo): the same as one, resumed by any number, restarted when one dies."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_transfer import build_vit, load_backbone
from mae_transfer.engine.checkpoints import all_checkpoints, latest_good_checkpoint
from mae_transfer.errors import run_tool
from pretrain.cli import main
from pretrain.load import load_mae
from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS, children, timeless, wait_for

ROOT = Path(__file__).parents[2]
STRATEGIES = ("ddp", "fsdp2")
ONE_AT_LEAST = [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"]  # minutes of processes that start
COMMON = (
    *(str(ROOT / "configs" / "pretrain" / "tiny.yaml"), *ARGUMENTS, "train.accumulate=2", "train.ema=0.9"),
    *("optim.clip_grad=1.0", "log.reconstruct_every_epochs=3", "log.evaluate_images=9", "train.steps=10"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 12)


def arguments(pictures: Path, run: Path, *more: str) -> list[str]:
    return [*COMMON, f"data.path={pictures}", f"data.val_path={pictures}", f"run.dir={run}", *more]


def launch(command: Sequence[str], *, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
        + [str(ROOT / "tools" / "pretrain.py"), *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def start_alone(command: Sequence[str]) -> subprocess.Popen[str]:
    tool = str(ROOT / "tools" / "pretrain.py")
    return subprocess.Popen([sys.executable, tool, *command], stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    try:
        errors = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"took too long: {process.communicate()[1]}") from error
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def one(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert run_tool(main, arguments(pictures, run)) == 0
    return run


@pytest.fixture(scope="module", params=STRATEGIES)
def two(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ten steps in two."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    finish(launch(arguments(pictures, run, f"train.distributed={request.param}")))
    return run


def assert_same_run(run: Path, expected: Path, *, first: int = 1) -> None:
    ours, theirs = timeless(run / "metrics.jsonl"), timeless(expected / "metrics.jsonl")
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(1, 11))
    for a, b in zip(ours[first - 1 :], theirs[first - 1 :], strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])
    for name in ("model.safetensors", "encoder.safetensors", "model_ema.safetensors", "encoder_ema.safetensors"):
        own, other = load_file(run / name), load_file(expected / name)
        assert set(own) == set(other)
        for key in own:
            torch.testing.assert_close(own[key], other[key], rtol=1e-3, atol=1e-4)


def test_two_processes_train_as_one(one: Path, two: Path) -> None:
    assert_same_run(two, one)
    assert timeless(two / "metrics.jsonl")[-1]["val_loss"] > 0
    assert [p.name for p in (two / "reconstructions").iterdir()] == [
        p.name for p in (one / "reconstructions").iterdir()
    ]


def test_the_average_is_not_the_weights(one: Path) -> None:
    weights, average = load_file(one / "encoder.safetensors"), load_file(one / "encoder_ema.safetensors")
    assert not torch.equal(weights["norm.weight"], average["norm.weight"])


def test_a_sharded_state_is_read_by_one_process(one: Path, two: Path, pictures: Path, tmp_path: Path) -> None:
    state = two / "checkpoints" / "step-00000006"
    if not state.exists():
        state = all_checkpoints(two / "checkpoints")[0]
    assert {path.suffix for path in state.iterdir()} == {".safetensors", ".json"}
    assert run_tool(main, arguments(pictures, tmp_path / "run", f"run.resume={state}")) == 0
    assert_same_run(tmp_path / "run", one)
    vit = build_vit(size="tiny", width=32, depth=2, num_heads=2, patch_size=4, image_size=16)
    assert not load_backbone(vit, state).missing
    assert torch.isfinite(load_mae(state).model.decoder_pred.weight).all()


@pytest.mark.parametrize("strategy", ONE_AT_LEAST)
def test_a_state_of_one_process_is_read_by_two(one: Path, pictures: Path, tmp_path: Path, strategy: str) -> None:
    state = one / "checkpoints" / "step-00000009.pt"
    finish(launch(arguments(pictures, tmp_path / "run", f"run.resume={state}", f"train.distributed={strategy}")))
    assert_same_run(tmp_path / "run", one)


def test_a_damaged_shard_is_noticed(
    two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = all_checkpoints(two / "checkpoints")
    shard = sorted(newest.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    changed = bytearray(whole)
    changed[-5] ^= 1
    try:
        for content, message in ((bytes(changed), "has changed"), (whole[:-9], "bytes, its manifest says")):
            shard.write_bytes(content)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert latest_good_checkpoint(two / "checkpoints") == older
            assert message in caplog.text and shard.name in caplog.text
    finally:
        shard.write_bytes(whole)
    assert latest_good_checkpoint(two / "checkpoints") == newest


@pytest.mark.parametrize("strategy", ONE_AT_LEAST)
def test_torchrun_restarts_after_a_process_died(
    pictures: Path, tmp_path: Path, strategy: str, request: pytest.FixtureRequest
) -> None:
    run, calm = tmp_path / "run", tmp_path / "calm"
    more = ("train.steps=60", f"train.distributed={strategy}", "log.reconstruct_every_epochs=0", "log.every_steps=2")
    process = launch(arguments(pictures, run, *more), restarts=2)
    wait_for(lambda: all_checkpoints(run / "checkpoints"), process)
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    errors = finish(process)
    assert "continuing from step" in errors
    finish(launch(arguments(pictures, calm, *more)))
    ours, theirs = timeless(run / "metrics.jsonl"), timeless(calm / "metrics.jsonl")
    assert ours == theirs and len(ours) == 60


def test_a_signal_to_one_process_stops_both(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(
        arguments(pictures, run, "train.steps=100000", "checkpoint.every_steps=50000", "log.every_steps=5")
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0, process)
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGUSR1)
    errors = process.communicate(timeout=120)[1]
    assert "state saved; continue with run.resume=auto" in errors
    assert "exitcode  : 75" in errors, "torchrun reports what its processes returned"
    (state,) = all_checkpoints(run / "checkpoints")
    assert state.name == f"step-{len(timeless(run / 'metrics.jsonl')):08d}"
    assert json.loads((state / "manifest.json").read_text())["facts"]["step"] == len(timeless(run / "metrics.jsonl"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_said_and_the_last_good_state_is_whole(pictures: Path, tmp_path: Path, processes: int) -> None:
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    command = arguments(pictures, run, "train.steps=100000", "log.reconstruct_every_epochs=0", "log.every_steps=3")
    if processes == 1:
        process = start_alone(command)
        workers = [process.pid]
    else:
        process = launch(command)
    wait_for(lambda: all_checkpoints(run / "checkpoints"), process)
    if processes == 2:
        workers = children(process.pid)
    for worker in workers:  # from now on no file may grow beyond 20 kB: as a full disk
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1, errors
    assert "cannot write" in errors and "Traceback" not in errors.split("failed (exitcode")[0], errors
    assert ("the disk may be full" if processes == 1 else "File too large") in errors
    newest = all_checkpoints(run / "checkpoints")[-1]
    assert latest_good_checkpoint(run / "checkpoints") == newest
    if processes == 2:
        assert f"the last whole one is {newest}" in errors


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_compiled_blocks_with_recomputation_train_the_same(
    one: Path, pictures: Path, tmp_path: Path, processes: int
) -> None:
    more = ("train.compile=true", "model.checkpointing=true", "train.distributed=fsdp2")
    command = arguments(pictures, tmp_path / "run", *more)
    # A process of its own in either case: torch.compile warns of itself, and here warnings are errors.
    finish(launch(command) if processes == 2 else start_alone(command), seconds=240)
    assert_same_run(tmp_path / "run", one)
