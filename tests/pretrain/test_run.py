"""Pretraining runs as a user starts them: what they write, that they repeat, resume and refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mae_transfer import build_vit, load_backbone
from mae_transfer.engine.config import read_config
from mae_transfer.engine.distribution import Processes
from mae_transfer.errors import run_tool
from pretrain.cli import main
from pretrain.config import PretrainConfig
from pretrain.objective import PretrainRun
from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS, timeless, wait_for

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "pretrain" / "tiny.yaml")
TOOL = [sys.executable, str(ROOT / "tools" / "pretrain.py")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 12)


def arguments(pictures: Path, run: Path, *more: str) -> list[str]:
    return [TINY, f"data.path={pictures}", f"run.dir={run}", *ARGUMENTS, *more]


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed, with pictures and evaluation."""
    run = tmp_path_factory.mktemp("finished") / "run"
    more = ("train.steps=12", f"data.val_path={pictures}", "log.reconstruct_every_epochs=4", "log.tensorboard=true")
    assert run_tool(main, arguments(pictures, run, *more)) == 0
    return run


def test_the_run_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.yaml", "environment.txt", "metrics.jsonl", "tensorboard", "reconstructions", "checkpoints"),
        *("model.safetensors", "encoder.safetensors"),
    }
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step-00000009.pt", "step-00000012.pt"}
    assert [path.name for path in sorted((finished / "reconstructions").iterdir())] == [
        f"step-{step:08d}.png" for step in (6, 12)
    ]
    assert list((finished / "tensorboard").iterdir())
    config = read_config(PretrainConfig, finished / "config.yaml")
    assert config.data.mean == [0.485, 0.456, 0.406] and config.model.width == 32
    records = timeless(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["epoch"] == pytest.approx(8) and records[-1]["val_loss"] > 0
    assert all(record["loss"] > 0 and record["lr"] >= 0 for record in records)


def test_the_encoder_is_what_transfer_loads(finished: Path) -> None:
    vit = build_vit(size="tiny", width=32, depth=2, num_heads=2, patch_size=4, image_size=16)
    report = load_backbone(vit, finished / "encoder.safetensors")
    assert not report.missing and not report.unexpected and not report.resized
    assert (report.info.patch_size, report.info.image_size, report.info.mean) == (
        (4, 4),
        (16, 16),
        (0.485, 0.456, 0.406),
    )
    with (
        safe_open(finished / "model.safetensors", "pt") as model,
        safe_open(finished / "encoder.safetensors", "pt") as own,
    ):
        assert set(own.keys()) < set(model.keys()) and "decoder_embed.weight" in model.keys()  # noqa: SIM118
        metadata = own.metadata()
    assert metadata["normalised_target"] == "true" and metadata["git_commit"]
    # A training state of a run that has not finished serves as well.
    assert not load_backbone(vit, finished / "checkpoints" / "step-00000009.pt").missing


def test_training_lowers_the_loss(finished: Path) -> None:
    losses = [record["loss"] for record in timeless(finished / "metrics.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_killed_and_resumed_to_the_last_bit(pictures: Path, finished: Path, tmp_path: Path) -> None:
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    # The run is long enough to be caught in the middle; it is resumed as the very same run.
    same = ("train.steps=150", "train.precision=bf16")
    command = [*TOOL, *arguments(pictures, run, *same, "run.resume=auto", "checkpoint.every_steps=7")]
    killed = start(command)
    wait_for(lambda: len(list((run / "checkpoints").glob("step-*.pt"))) > 0, killed)
    killed.kill()
    killed.communicate()
    reached = len(metrics.read_text().splitlines())
    assert 7 <= reached < 150
    resumed = start(command)
    errors = resumed.communicate(timeout=120)[1]
    assert resumed.returncode == 0 and "continuing from step" in errors, errors
    again = tmp_path / "again"
    assert run_tool(main, arguments(pictures, again, *same, "checkpoint.every_steps=1000")) == 0
    assert timeless(metrics) == timeless(again / "metrics.jsonl")
    with safe_open(run / "model.safetensors", "pt") as a, safe_open(again / "model.safetensors", "pt") as b:
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


def test_sigterm_saves_and_exits_75(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = ("train.steps=100000", "checkpoint.every_steps=50000", "data.workers=1")
    process = start([*TOOL, *arguments(pictures, run, *long)])
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0, process)
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster does: the data worker gets it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM, state saved; continue with run.resume=auto" in errors
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.stem == f"step-{len(timeless(run / 'metrics.jsonl')):08d}"


def test_workers_and_processes_change_no_pixel(pictures: Path, tmp_path: Path) -> None:
    alone = Processes(device=torch.device("cpu"))

    def stream(*overrides: str, processes: Processes = alone) -> list[tuple[torch.Tensor, torch.Tensor]]:
        config = read_config(PretrainConfig, None, [*ARGUMENTS, f"data.path={pictures}", "train.steps=3", *overrides])
        run = PretrainRun(config, alone)
        run.processes = processes  # one of two that do not exist: what it would be given
        return [(batch.images, batch.noise) for batch in run.batches(0)]

    expected = stream()
    for overrides in (["data.workers=1"], ["data.workers=2"], ["data.cache=ram"]):
        for a, b in zip(stream(*overrides), expected, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), overrides
    halves = [stream(processes=Processes(device=torch.device("cpu"), rank=rank, world_size=2)) for rank in (0, 1)]
    for step, (images, noise) in enumerate(expected):
        assert torch.equal(torch.cat([half[step][0] for half in halves]), images)
        assert torch.equal(torch.cat([half[step][1] for half in halves]), noise)


def test_unreadable_images_are_named_replaced_and_limited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "pictures", 11)
    (folder / "broken.png").write_bytes(b"no image")
    for workers, run in ((0, tmp_path / "a"), (2, tmp_path / "b")):
        more = ("train.steps=6", "data.max_unreadable=0.1", f"data.workers={workers}", "log.reconstruct_every_epochs=9")
        assert run_tool(main, arguments(folder, run, *more)) == 0
    assert timeless(tmp_path / "a" / "metrics.jsonl") == timeless(tmp_path / "b" / "metrics.jsonl")
    named = [record.getMessage() for record in caplog.records if "broken.png" in record.getMessage()]
    assert len(named) == 2 and "1 unreadable so far" in named[0], "once a run"
    assert run_tool(main, arguments(folder, tmp_path / "c", "train.steps=6")) == 1
    assert "1 of 12 images cannot be read, more than data.max_unreadable=0.01" in capsys.readouterr().err


def test_inputs_of_a_step_that_was_not_finite_are_kept(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate so high that the second step overflows.
    more = ("train.steps=20", "optim.base_lr=1e30", "train.max_skipped=1", "optim.warmup_epochs=0")
    assert run_tool(main, arguments(pictures, tmp_path / "run", *more)) == 1
    assert "a lower optim.base_lr" in capsys.readouterr().err
    kept = sorted((tmp_path / "run" / "nonfinite").iterdir())
    content = torch.load(kept[0], weights_only=True)
    assert content["images"].shape == (8, 3, 16, 16) and len(content["files"]) == 8


def test_dry_run_and_printing_write_nothing(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(pictures, tmp_path / "run", "train.steps=12")
    assert run_tool(main, [*command, "--dry-run"]) == 0
    output = capsys.readouterr().out
    for word in ("parameters", "GFLOP", "peak memory", "images/s", "projected time"):
        assert word in output
    assert run_tool(main, [*command, "--print-config"]) == 0
    assert "decoder_dim: 32" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=null"], "data.path=FOLDER"),
        (["data.path=absent"], "image folder absent does not exist"),
        (["train.steps=5", "data.val_path=absent"], "image folder absent does not exist"),
        (["train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["train.steps=5", "train.epochs=5"], "give one of them"),
        (["train.steps=5", "optim.warmup_epochs=100"], "longer than the run"),
        (["train.steps=5", "train.accumulate=3"], "use a multiple of 3"),
        (["train.steps=5", "train.precision=fp16"], "fp16 needs a GPU"),
        (["train.steps=5", "run.resume=absent.pt"], "neither auto, never"),
        (["train.steps=5", "train.distributed=fsdp2", "train.precision=fp16"], "do not go together"),
    ],
)
def test_bad_input_is_a_line_and_status_2(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    assert run_tool(main, arguments(pictures, tmp_path / "run", *changes)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists(), "a mistake leaves no folder behind"


def test_empty_and_used_folders(
    pictures: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run_tool(main, arguments(tmp_path / "empty", tmp_path / "run", "train.steps=5")) == 2
    assert "no images found" in capsys.readouterr().err
    assert run_tool(main, arguments(pictures, finished, "train.steps=12")) == 2
    assert "is not empty" in capsys.readouterr().err


def test_another_run_is_not_continued(pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ("train.steps=12", f"data.val_path={pictures}", "mask.ratio=0.5", "run.resume=auto")
    assert run_tool(main, arguments(pictures, finished, *changed)) == 2
    assert "mask.ratio was 0.75, is 0.5" in capsys.readouterr().err
    foreign = finished / "encoder.safetensors"
    assert run_tool(main, arguments(pictures, finished, "train.steps=12", f"run.resume={foreign}")) == 2
    assert "is not a training state of this project" in capsys.readouterr().err


def test_a_finished_run_has_nothing_left_to_do(pictures: Path, finished: Path) -> None:
    before = timeless(finished / "metrics.jsonl")
    more = ("train.steps=12", f"data.val_path={pictures}", "run.resume=auto")
    assert run_tool(main, arguments(pictures, finished, *more)) == 0
    assert timeless(finished / "metrics.jsonl") == before


def test_continuing_in_another_folder_brings_the_lines_along(pictures: Path, finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-00000009.pt"
    more = ("train.steps=12", f"data.val_path={pictures}", f"run.resume={checkpoint}")
    assert run_tool(main, arguments(pictures, tmp_path / "run", *more)) == 0
    assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(finished / "metrics.jsonl")


def test_help_names_the_tool_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("tools/pretrain.py", "--dry-run", "--evaluate", "--print-config"))
