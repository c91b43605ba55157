"""Atomic files, checkpoints, metrics, the run folder."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_transfer.engine.checkpoints import (
    CheckpointWriter,
    all_checkpoints,
    latest_checkpoint,
    latest_good_checkpoint,
    load_file,
    verify_checkpoint,
)
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.files import atomic_path, write_text, write_weights
from mae_transfer.engine.metrics import MetricsLog, read_metrics
from mae_transfer.engine.run_folder import RunConfig, describe_environment, open_run_folder
from mae_transfer.errors import CheckpointError, ConfigError, DataError, RunFailed


def save_checkpoint(folder: Path, step: int, weight: torch.Tensor, *, keep: int = 1) -> Path:
    writer = CheckpointWriter(folder, keep=keep, processes=Processes(device=torch.device("cpu")))
    writer.save({"step": step}, {"model.weight": weight})
    writer.close()
    return folder / f"step-{step:08d}.pt"


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def killed_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_failed_run_with_its_reason() -> None:
    with pytest.raises(RunFailed, match="cannot write"):
        write_text("/proc/file.txt", "text")


def test_a_disk_that_fills_up_while_saving_leaves_the_last_good_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    state, metadata = {"weight": torch.zeros(100_000)}, {"format": "pt"}
    save_checkpoint(tmp_path, 1, state["weight"])
    write_weights(tmp_path / "model.safetensors", state, metadata)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow beyond: as a full disk
    try:
        with pytest.raises(RunFailed, match=r"cannot write .*step-00000002\.pt"):
            save_checkpoint(tmp_path, 2, state["weight"])
        with pytest.raises(RunFailed, match=r"cannot write .*model\.safetensors"):
            write_weights(tmp_path / "model.safetensors", state, metadata)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        save_checkpoint(tmp_path, step, torch.full((2,), float(step)), keep=2)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000020.pt", "step-00000100.pt"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load_file(latest)["model"]["weight"].tolist() == [100, 100]


def test_checkpoints_that_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "foreign.pt")
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "pickle.pt")
    whole = save_checkpoint(tmp_path, 1, torch.zeros(1000))
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="is not a training state of this project"):
        load_file(tmp_path / "foreign.pt")
    for name in ("pickle.pt", "cut.pt", "text.pt"):
        with pytest.raises(CheckpointError, match=f"cannot read training state .*{name}"):
            load_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_file(tmp_path / "absent.pt")


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, torch.arange(1000.0), keep=3)
    first, second, third = all_checkpoints(tmp_path)
    assert latest_good_checkpoint(tmp_path) == third
    third.write_bytes(third.read_bytes()[:-500])  # cut off
    content = bytearray(second.read_bytes())
    content[content.index(torch.arange(500.0, 600.0).numpy().tobytes()) + 50] ^= 1  # a bit of a weight
    second.write_bytes(content)
    # The container still opens and gives a tensor: only its checksum knows.
    assert not torch.equal(load_file(second)["model"]["weight"], torch.arange(1000.0))
    assert latest_good_checkpoint(tmp_path) == first
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and third.name in warnings[0] and "has changed since it was saved" in warnings[1]
    first.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all 3 checkpoints .* are damaged"):
        latest_good_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cut off"):
        verify_checkpoint(first)


def test_metrics_are_continued_without_gaps_or_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 8))
    log = MetricsLog(path, last_step=5)
    for step in range(6, 10):
        log.write({"step": step, "loss": -float(step)})
    log.close()
    records = read_metrics(path)
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["loss"] for record in records] == [1, 2, 3, 4, 5, -6, -7, -8, -9]


def test_metrics_are_strict_json_and_reach_tensorboard(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")
    log.write({"step": 1, "loss": float("nan")})
    log.flush()
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None}
    assert list((tmp_path / "tensorboard").iterdir())


def test_metrics_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "absent.jsonl")
    (tmp_path / "bad.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_metrics(tmp_path / "bad.jsonl")


def test_a_used_folder_is_refused_unless_resumed_or_overwritten(tmp_path: Path) -> None:
    root = tmp_path / "run"
    folder, checkpoint = open_run_folder(RunConfig(dir=str(root)))
    assert checkpoint is None and folder.checkpoints.is_dir()
    folder.lock.touch()
    for resume in ("auto", "never"):  # killed while a linear probe computed its features: nothing to lose
        assert open_run_folder(RunConfig(dir=str(root), resume=resume))[1] is None
    folder.write_description("a: 1\n")
    with pytest.raises(ConfigError, match=r"is not empty; .* run\.resume=auto.* run\.overwrite=true"):
        open_run_folder(RunConfig(dir=str(root)))
    assert open_run_folder(RunConfig(dir=str(root), resume="auto"))[1] is None, "killed before its first checkpoint"
    saved = save_checkpoint(folder.checkpoints, 3, torch.zeros(2))
    assert open_run_folder(RunConfig(dir=str(root), resume="auto"))[1] == saved
    assert open_run_folder(RunConfig(dir=str(root), resume=str(root)))[1] == saved
    assert open_run_folder(RunConfig(dir=str(root), resume=str(saved)))[1] == saved
    assert open_run_folder(RunConfig(dir=str(tmp_path / "other"), resume=str(saved)))[1] == saved
    assert open_run_folder(RunConfig(dir=str(root), overwrite=True))[1] is None
    assert not saved.exists()


def test_a_folder_that_a_living_process_writes_to_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "run"
    folder, _ = open_run_folder(RunConfig(dir=str(root)))
    folder.write_description("")
    hold = "import sys, time; from mae_transfer.engine.run_folder import RunFolder\n"
    hold += "with RunFolder(sys.argv[1]).in_use(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(root)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for config in (RunConfig(dir=str(root), resume="auto"), RunConfig(dir=str(root), overwrite=True)):
            with pytest.raises(ConfigError, match=f"is being written to by process {other.pid} on"):
                open_run_folder(config)
        with pytest.raises(ConfigError, match="stop it, or name another"), folder.in_use():
            pass
        other.kill()
    open_run_folder(RunConfig(dir=str(root), resume="auto"))
    with folder.in_use():
        pass
    assert not folder.lock.exists()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    for config, message in (
        (RunConfig(dir=str(tmp_path / "file")), "is a file"),
        (RunConfig(dir=str(tmp_path / "foreign"), resume="auto"), "is not empty"),
        (RunConfig(dir=str(tmp_path / "new"), resume="absent.pt"), "neither auto, never"),
        (RunConfig(dir=str(tmp_path / "new"), resume=str(tmp_path / "foreign")), "no checkpoint found"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_run_folder(config)
    with pytest.raises(ConfigError, match="contradict"):
        RunConfig(resume="auto", overwrite=True)


def test_the_environment_names_versions_and_commit() -> None:
    lines = dict(line.split(": ", 1) for line in describe_environment().splitlines())
    assert lines["torch"] == torch.__version__.split("+")[0] or lines["torch"] == torch.__version__
    assert lines["git_commit"]
