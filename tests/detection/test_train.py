"""The tools as a user calls them: train, die, resume, evaluate, predict, and be told what is wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_transfer.checkpoint import encoder_state, write_safetensors
from mae_transfer.checkpoint.load import describe
from mae_transfer.detection.config import load_config
from mae_transfer.detection.predict import Predictor
from mae_transfer.detection.train import main
from mae_transfer.errors import CheckpointError, UserError, run_tool
from mae_transfer.predict import main as predict
from mae_transfer.vit import build_vit

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "detection" / "tiny.py")
# The smallest run that has every part.
SMALL = [
    "dataset.image_size=64",
    "dataset.workers=0",
    "model.patch_size=16",
    "model.channels=32",
    "model.box_fc_width=64",
    "model.mask_convs=1",
    "model.anchor_sizes=[8,16,32,64,128]",
    "model.rois_per_image=16",
    "schedule.warmup_iters=2",
    "train.device=cpu",
]


def arguments(scenes: Any, output: Path, *more: str) -> list[str]:
    return ["--config-file", TINY, *scenes.overrides, f"train.output_dir={output}", *SMALL, *more]


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.json without what the clock said."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "time" not in name} for line in lines]


def weights(output: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(output / name, weights_only=True)["model"]


@contextmanager
def tool_running(given: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """tools/train_det.py in a process that does not outlive the test; threads as here, for equal sums."""
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "train_det.py"), *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def wait_for(path: Path, child: subprocess.Popen[bytes]) -> None:
    """Until ``path`` has content."""
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_size):
        assert child.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=4, side=64)


def test_killed_and_resumed_ends_where_the_uninterrupted_run_does(scenes: Any, tmp_path: Path) -> None:
    given = ["train.max_iter=10", "train.checkpoint_period=2", "train.keep=1", "train.pictures=0", "train.log_period=3"]
    given += ["train.accumulate=2", "train.ema=0.9", "train.eval_period=4", "train.clip_norm=1"]
    assert main(arguments(scenes, tmp_path / "whole", *given)) == 0

    killed = tmp_path / "killed"
    with tool_running(arguments(scenes, killed, *given)) as child:
        wait_for(killed / "last_checkpoint", child)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (killed / "model_final.pth").exists()

    assert main([*arguments(scenes, killed, *given), "--resume"]) == 0
    whole = metrics(tmp_path / "whole")
    assert [line["iteration"] for line in whole] == list(range(11))
    assert [line["iteration"] for line in whole if "segm/AP" in line] == [4, 8, 10]
    assert metrics(killed) == whole
    curve = EventAccumulator(str(killed)).Reload().Scalars("total_loss")
    assert [point.step for point in curve] == sorted({point.step for point in curve})
    for name in ("model_final.pth", "model_best.pth"):
        expected, got = weights(tmp_path / "whole", name), weights(killed, name)
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    left = sorted(path.name for path in killed.glob("*.pth"))
    assert left == ["model_0000009.pth", "model_best.pth", "model_final.pth"]


def test_sigterm_saves_and_says_so(scenes: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with tool_running(arguments(scenes, output, "train.max_iter=100000", "train.log_period=1")) as child:
        wait_for(output / "metrics.json", child)
        child.terminate()
        assert child.wait(timeout=300) == 75
    assert (output / (output / "last_checkpoint").read_text()).is_file()


def test_trains_evaluates_and_predicts(scenes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit = build_vit("tiny", patch_size=8, image_size=32)
    encoder = tmp_path / "encoder.safetensors"
    write_safetensors(encoder, encoder_state(vit.state_dict()), describe(vit).to_metadata())
    output = tmp_path / "run"
    settings = ["train.max_iter=4", "optimizer.lr=1e-9", "model.detections_per_image=30", "model.patch_size=null"]
    given = arguments(scenes, output, *settings, f"train.init_checkpoint={encoder}")
    assert main(given) == 0

    # The encoder is the checkpoint's: at this learning rate only its position table, resized, can differ.
    trained = weights(output)
    for name, value in vit.state_dict().items():
        if name.startswith("blocks."):
            torch.testing.assert_close(trained[f"backbone.net.{name}"], value, atol=1e-6, rtol=0)
    log = (output / "log.txt").read_text()
    assert "loaded" in log
    assert "missing     blocks.*.attn.rel_pos_h (12)" in log
    result = json.loads((output / "evaluation.json").read_text())
    assert (result["iteration"], result["num_images"], result["max_dets"]) == (4, 4, 30)
    assert {"AP", "AP50", "AP75"} <= result["bbox"].keys() & result["segm"].keys()
    assert len(list((output / "predictions").glob("*.png"))) == 4
    assert {"total_loss", "lr", "grad_norm", "loss_mask"} <= metrics(output)[0].keys()
    assert metrics(output)[-1]["segm/AP"] == result["segm"]["AP"]
    assert list(output.glob("events.out.tfevents*"))
    assert load_config(output / "config.yaml").model.patch_size == 8

    (output / "evaluation.json").unlink()
    assert main([*given, "--eval-only"]) == 0
    again = json.loads((output / "evaluation.json").read_text())
    assert again["bbox"]["AP"] == pytest.approx(result["bbox"]["AP"])

    Image.fromarray(np.zeros((70, 50, 4), np.uint8)).save(tmp_path / "rgba.png")
    out = tmp_path / "predicted"
    assert predict([str(output), str(scenes.images), str(tmp_path / "rgba.png"), "--out", str(out)]) == 0
    assert "5 images, detection" in capsys.readouterr().out
    listing = json.loads((out / "images.json").read_text())
    assert [Path(image["file_name"]).name for image in listing["images"]][-1] == "rgba.png"
    detections = json.loads((out / "detections.json").read_text())
    assert {d["category_id"] for d in detections} <= {3, 7}
    with Image.open(out / "0004_rgba.png") as overlay:
        assert overlay.size == (7 * 50, 7 * 70)  # small pictures are enlarged, so that labels can be read
    assert predict([str(output / "model_final.pth"), str(tmp_path / "rgba.png"), "--out", str(out / "more")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["train.epoch=3"], "unknown key train.epoch"),
        (["dataset.train.json=nothing.json"], "nothing.json does not exist"),
        (["dataset.val.images=nothing"], "image folder nothing"),
        (["train.init_checkpoint=nothing.safetensors"], "nothing.safetensors"),
        (["train.precision=fp16"], "train.precision=fp16 needs a GPU"),
        (["train.precision=half"], "train.precision=half"),
        (["train.batch_size=3", "--num-gpus", "2"], "does not divide among 2"),
        (["--config-file", "nothing.py"], "nothing.py does not exist"),
        (["train.device=tpu9"], "train.device=tpu9"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    change: list[str], message: str, scenes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run_tool(main, [*arguments(scenes, tmp_path / "run", "train.max_iter=3"), *change])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_refused_for_its_encoder_can_be_started_again(scenes: Any, tmp_path: Path) -> None:
    """A foreign checkpoint is refused by name; the folder it leaves does not stand in the way of the next try."""
    vit = build_vit("small", patch_size=16, image_size=32)
    encoder = tmp_path / "encoder.safetensors"
    write_safetensors(encoder, encoder_state(vit.state_dict()), describe(vit).to_metadata())
    short = ["train.max_iter=3", "dataset.val.json=null", "dataset.val.images=null"]
    with pytest.raises(CheckpointError, match="does not fit this 192-wide"):
        main(arguments(scenes, tmp_path / "run", *short, f"train.init_checkpoint={encoder}"))
    assert main(arguments(scenes, tmp_path / "run", *short)) == 0


def test_a_used_folder_is_refused(scenes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert run_tool(main, arguments(scenes, tmp_path / "run")) == 2
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_two_runs_do_not_share_a_folder(scenes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    hold += "print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / ".in-use")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert run_tool(main, [*arguments(scenes, tmp_path / "run", "train.max_iter=3"), "--resume"]) == 2
        holder.kill()
    assert "train.output_dir=" in (error := capsys.readouterr().err)
    assert "is being written to by" in error


def test_a_refused_resume_leaves_the_runs_config(scenes: Any, tmp_path: Path) -> None:
    given = arguments(scenes, tmp_path / "run", "train.max_iter=3", "dataset.val.json=null", "dataset.val.images=null")
    assert main(given) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    for change, message in (
        ("train.seed=1", "trained with train.seed=0"),
        ("train.ema=0.9", "holds no average"),
        ("optimizer.decay_rule=all", "has other parameters"),
        ("model.mask_convs=2", "does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            main([*given, change, "--resume"])
    with pytest.raises(UserError, match="has done 3 iterations, more than the 2 of this run"):
        main([*given, "train.max_iter=2", "schedule.warmup_iters=1", "--resume"])
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_eval_only_needs_a_checkpoint(scenes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(main, [*arguments(scenes, tmp_path / "run"), "--eval-only"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_predict_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    for run, images, message in (
        (tmp_path / "none", tmp_path, "does not exist"),
        (tmp_path, tmp_path, "holds no config"),
    ):
        assert run_tool(predict, [str(run), str(images), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(scenes: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    no_val = ["dataset.val.json=null", "dataset.val.images=null", "train.max_iter=3"]
    assert main(arguments(scenes, output, *no_val)) == 0
    text = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(text.replace("mask_convs: 1", "mask_convs: 2"))
    with pytest.raises(ValueError, match=r"missing: roi_heads\.mask_head\.mask_fcn2"):
        Predictor(output)
    (output / "model_final.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        Predictor(output)


def test_an_average_is_what_is_evaluated_kept_as_best_and_predicted_with(scenes: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = arguments(scenes, output, "train.max_iter=4", "train.ema=0.9", "train.best=bbox/AP", "train.pictures=0")
    assert main(given) == 0
    state = torch.load(output / "model_final.pth", weights_only=True)
    average = state["trainer"]["ema"]
    best = weights(output, "model_best.pth")
    assert all(torch.equal(best[name], value) for name, value in average.items())
    assert any(not torch.equal(state["model"][name], value) for name, value in average.items())

    first = json.loads((output / "evaluation.json").read_text())
    detections = (output / "coco_instances_results.json").read_text()
    assert main([*given, "--eval-only"]) == 0
    assert json.loads((output / "evaluation.json").read_text())["bbox"] == first["bbox"]
    assert (output / "coco_instances_results.json").read_text() == detections


def test_a_whole_detector_is_gone_on_with_and_its_first_blocks_stay(scenes: Any, tmp_path: Path) -> None:
    no_val = ["dataset.val.json=null", "dataset.val.images=null", "train.max_iter=3"]
    assert main(arguments(scenes, tmp_path / "first", *no_val)) == 0
    first = weights(tmp_path / "first")
    source = tmp_path / "first" / "model_final.pth"
    more = [f"train.init_checkpoint={source}", "train.freeze_blocks=3"]
    assert main(arguments(scenes, tmp_path / "second", *no_val, *more)) == 0
    second = weights(tmp_path / "second")
    moved = {name for name, value in second.items() if not torch.equal(value, first[name])}
    assert "roi_heads.mask_head.predictor.weight" in moved
    assert "backbone.net.blocks.3.attn.qkv.weight" in moved
    still = ("backbone.net.patch_embed.", "backbone.net.pos_embed", *(f"backbone.net.blocks.{i}." for i in range(3)))
    assert not [name for name in moved if name.startswith(still)]
    # From where the first run ended: a few steps at a small rate do not take it far.
    name = "roi_heads.box_head.fc1.weight"
    assert (second[name] - first[name]).abs().max() < 0.01
    assert "The whole detector from" in (tmp_path / "second" / "log.txt").read_text()


TWO = [sys.executable, str(ROOT / "tools" / "train_det.py"), "--num-gpus", "2"]


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_where_the_uninterrupted_ones_do(scenes: Any, tmp_path: Path) -> None:
    more = [
        "train.max_iter=8",
        "train.checkpoint_period=2",
        "train.batch_size=4",
        "train.accumulate=2",
        "train.ema=0.9",
    ]
    more += ["train.eval_period=3", "train.pictures=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = arguments(scenes, tmp_path / "whole", *more)
    subprocess.run([*TWO, *whole], check=True, capture_output=True, timeout=300, env=environment)
    killed = tmp_path / "killed"
    given = arguments(scenes, killed, *more)
    child = subprocess.Popen(
        [*TWO, *given], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        wait_for(killed / "last_checkpoint", child)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    subprocess.run([*TWO, *given, "--resume"], check=True, capture_output=True, timeout=300, env=environment)
    assert metrics(killed) == metrics(tmp_path / "whole")
    assert [line["iteration"] for line in metrics(killed)] == list(range(9))
    expected, got = weights(tmp_path / "whole"), weights(killed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert json.loads((killed / "evaluation.json").read_text())["num_images"] == 4


@pytest.mark.slow
def test_two_processes_see_the_samples_that_one_does(scenes: Any, tmp_path: Path) -> None:
    """With every anchor and region in the losses, and none left out at random, the runs are the same to rounding."""
    more = ["train.max_iter=3", "train.batch_size=4", "train.precision=fp32", "train.log_period=1"]
    more += ["dataset.val.json=null", "dataset.val.images=null", "model.rpn_anchors_per_image=100000"]
    more += ["model.rois_per_image=100000", "model.drop_path=0.0"]
    assert main(arguments(scenes, tmp_path / "one", *more)) == 0
    subprocess.run([*TWO, *arguments(scenes, tmp_path / "two", *more)], check=True, capture_output=True, timeout=300)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss_rpn_cls"] == pytest.approx(one["loss_rpn_cls"], rel=1e-3)
        assert two["lr"] == one["lr"]


@pytest.mark.slow
def test_two_machines_train_as_two_processes_of_one(scenes: Any, tmp_path: Path) -> None:
    more = ["train.max_iter=3", "train.batch_size=4", "train.pictures=0"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    given = arguments(scenes, tmp_path / "machines", *more)
    flags = ["--num-gpus", "1", "--num-machines", "2", "--dist-url", url]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [*TWO[:2], *flags, "--machine-rank", str(rank), *given], stdout=subprocess.DEVNULL, env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    one = arguments(scenes, tmp_path / "one", *more)
    subprocess.run([*TWO, *one], check=True, capture_output=True, timeout=300, env=environment)
    assert metrics(tmp_path / "machines") == metrics(tmp_path / "one")
    assert json.loads((tmp_path / "machines" / "evaluation.json").read_text())["num_images"] == 4


@pytest.mark.slow
def test_a_signal_to_the_parent_saves_and_a_users_mistake_is_one_line(scenes: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = arguments(scenes, output, "train.max_iter=100000", "train.log_period=1")
    child = subprocess.Popen([*TWO, *given], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(output / "metrics.json", child)
        child.terminate()
        assert child.wait(timeout=300) == 75
    finally:
        child.kill()
        child.wait()
    assert (output / (output / "last_checkpoint").read_text()).is_file()
    changed = arguments(scenes, output, "train.max_iter=100000", "train.seed=5")
    refused = subprocess.run([*TWO, *changed, "--resume"], capture_output=True, timeout=300, text=True)
    assert refused.returncode == 2
    assert "error: the checkpoint was trained with train.seed=0 and this run has 5" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout


@pytest.mark.parametrize("tool", [main, predict])
def test_help(tool: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tool(["--help"])
    assert caught.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.slow
def test_a_handful_of_scenes_is_learned_by_heart(make_scenes: Callable[..., Any], tmp_path: Path) -> None:
    scenes = make_scenes(name="few", num_images=4, side=64)
    given = arguments(
        scenes,
        tmp_path / "run",
        "train.max_iter=400",
        "train.batch_size=4",
        "model.patch_size=8",
        "model.channels=64",
        "model.box_fc_width=256",
        "model.rois_per_image=32",
        "dataset.flips=[]",
        "optimizer.lr=1e-3",
        "schedule.warmup_iters=10",
    )
    assert main(given) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["bbox"]["AP"] > 95
    assert result["segm"]["AP"] > 90
