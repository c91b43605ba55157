"""Comparing starts: what is run, resumed, refused, and what is said of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from mae_transfer import build_vit
from mae_transfer.checkpoint import describe, encoder_state, write_safetensors
from mae_transfer.checkpoint.hub import is_address
from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.model import Classifier
from mae_transfer.engine.config import read_config
from mae_transfer.errors import CheckpointError, RunFailed, run_tool
from mae_transfer.study import compare
from mae_transfer.study.classification import ClassificationTask
from mae_transfer.study.cli import main, parse_init
from mae_transfer.study.compare import Init, Outcome, Run, plan, run_all, verdicts, write_results
from mae_transfer.study.detection import DetectionTask
from mae_transfer.study.jobs import claim, seconds_of
from mae_transfer.study.segmentation import SegmentationTask
from tests.classification.small import write_classes

ROOT = Path(__file__).resolve().parents[2]
INITS = [Init(name="pretrained", checkpoint=Path("x")), Init(name="random", checkpoint=None)]

# A training of 4 steps that saves each, waits where it is told to, and goes on from what it saved.
TRAINING = """
import json, pathlib, signal, sys, time
folder, gain, wait = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder.mkdir(exist_ok=True)
log = folder / "log"
done = len(log.read_text().split()) if log.exists() else 0
for step in range(done, 4):
    time.sleep(wait)
    with log.open("a") as stream:
        stream.write(f"{gain * (step + 1)} ")
if folder.name == "seed-13":
    sys.exit("no luck")
"""


class Training:
    """A task whose runs end at 4 x (2 if pretrained else 1) + a seed's hundredth."""

    metrics: ClassVar[Mapping[str, str]] = {"score": "score"}

    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait
        self.started: list[str] = []

    def check(self, run: Run) -> None: ...

    def command(self, run: Run) -> list[str]:
        self.started.append(run.title)
        gain = (2 if run.init.checkpoint else 1) + run.seed / 400
        return ["-c", TRAINING, str(run.folder), str(gain), str(self.wait)]

    def curves(self, run: Run) -> dict[str, compare.Curve]:
        return {"score": [(step, float(value)) for step, value in enumerate(self.values(run), start=1)]}

    def values(self, run: Run) -> list[str]:
        log = run.folder / "log"
        return log.read_text().split() if log.exists() else []

    def is_finished(self, run: Run) -> bool:
        return len(self.values(run)) == 4


def test_every_run_is_run_once_and_the_results_say_what_came_of_it(tmp_path: Path) -> None:
    runs, task = plan(tmp_path, inits=INITS, seeds=[0, 1], fractions=[0.25, 1.0]), Training()
    assert len(runs) == 8
    assert run_all(task, runs, jobs=2, threads=1) is None
    assert len(task.started) == 8
    assert run_all(task, runs, jobs=2, threads=1) is None
    assert len(task.started) == 8
    write_results(tmp_path, task, runs)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    first = np.array([8.0, 8.01])
    assert f"| 25 % | pretrained | 2 | {first.mean():.2f} ± {first.std(ddof=1):.2f} [8.00–8.01] |" in text
    assert "25 % of the labels, score: pretrained +4.00 over random; its worst seed is above the other's best" in text
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [entry["curves"]["score"][-1] for entry in content if entry["init"] == "random"][:2] == [[4, 4.0]] * 2
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_seeds_that_overlap_are_called_so() -> None:
    found = [
        Outcome(fraction=1.0, init="a", metric="m", values=(40.0, 43.0)),
        Outcome(fraction=1.0, init="b", metric="m", values=(41.0, 39.0)),
    ]
    assert verdicts(found, {"m": "AP"}) == ["100 % of the labels, AP: a +1.50 over b; the seeds overlap"]


def test_a_signal_stops_the_runs_and_the_same_call_goes_on(tmp_path: Path) -> None:
    runs, task = plan(tmp_path, inits=INITS, seeds=[0], fractions=[1.0]), Training(wait=0.3)

    def interrupt() -> None:
        while not task.values(runs[0]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_all(task, runs, jobs=2, threads=1) == "SIGTERM"
    thread.join()
    assert not task.is_finished(runs[0])
    assert run_all(task, runs, jobs=1, threads=1) is None
    assert [float(value) for value in task.values(runs[0])] == [2.0, 4.0, 6.0, 8.0]
    assert seconds_of(runs[0].folder) > 4 * 0.3  # both parts


def test_a_run_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    runs = plan(tmp_path, inits=INITS, seeds=[13, 14], fractions=[1.0])
    with pytest.raises(RunFailed, match=r"(?s)100 % of the labels, pretrained, seed 13.*no luck"):
        run_all(Training(), runs, jobs=1, threads=1)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    vit = build_vit("tiny", patch_size=8, image_size=64)
    path = tmp_path / "encoder.safetensors"
    info = describe(vit, mean=(0.5, 0.25, 0.125), std=(0.25, 0.25, 0.25))
    write_safetensors(path, vit.state_dict(), info.to_metadata())
    return path


def test_a_random_start_gets_what_the_checkpoint_says_of_its_input(encoder: Path, tmp_path: Path) -> None:
    inits = [Init(name="pretrained", checkpoint=encoder), Init(name="random", checkpoint=None)]
    task = DetectionTask(ROOT / "configs/detection/tiny.py", ["train.max_iter=5", "dataset.std=[1,1,1]"], inits)
    runs = plan(tmp_path, inits=inits, seeds=[3], fractions=[0.25])
    first, other = (task.command(run) for run in runs)
    common = {"model.patch_size=8", "dataset.mean=[0.5,0.25,0.125]", "dataset.std=[1,1,1]", "train.max_iter=5"}
    common |= {"train.seed=3", "dataset.train.fraction=0.25", "dataset.train.fraction_seed=3"}
    assert common <= set(first) and common <= set(other)
    own = {f"train.output_dir={run.folder}" for run in runs} | {f"train.init_checkpoint={encoder}"}
    assert set(first) ^ set(other) == own


def test_so_it_does_in_segmentation(encoder: Path, tmp_path: Path) -> None:
    inits = [Init(name="pretrained", checkpoint=encoder), Init(name="random", checkpoint=None)]
    task = SegmentationTask(ROOT / "configs/segmentation/upernet_tiny.py", ["train.max_iters=5"], inits)
    first, other = (task.settings(run) for run in plan(tmp_path, inits=inits, seeds=[3], fractions=[0.25]))
    mean, std = "[127.5,63.75,31.875]", "[63.75,63.75,63.75]"
    common = {"encoder.patch_size=8", f"model.data_preprocessor.mean={mean}", f"model.data_preprocessor.std={std}"}
    common |= {"train.max_iters=5", "train.seed=3", "dataset.fraction=0.25", "dataset.fraction_seed=3"}
    assert set(other) == common
    assert set(first) == common | {f"init_checkpoint={encoder}"}


def test_so_it_does_in_classification(encoder: Path, tmp_path: Path) -> None:
    inits = [Init(name="pretrained", checkpoint=encoder), Init(name="random", checkpoint=None)]
    config = ROOT / "configs/classification/study_finetune.yaml"
    task = ClassificationTask(config, ["train.epochs=5", "data.std=[1,1,1]"], inits)
    runs = plan(tmp_path, inits=inits, seeds=[3], fractions=[0.25])
    first, other = (task.settings(run) for run in runs)
    common = {"train.epochs=5", "data.std=[1,1,1]", "data.mean=[0.5,0.25,0.125]", "data.channels=3", "run.seed=3"}
    common |= {"model.patch_size=[8,8]", "model.width=192", "model.depth=12", "model.num_heads=3", "model.size=tiny"}
    common |= {
        "model.architecture={}",
        "model.pooled_norm=false",
        "data.fraction=0.25",
        "data.fraction_seed=3",
        "run.resume=auto",
    }
    assert set(other) == common | {f"run.dir={runs[1].folder}"}
    assert set(first) == common | {f"run.dir={runs[0].folder}", f"init_checkpoint={encoder}"}
    models = []
    for run in runs:
        task.check(run)
        resolved = read_config(ClassificationConfig, config, task.settings(run)).resolved()
        models.append((resolved.model, resolved.data.mean, resolved.data.std))
    assert models[0] == models[1]


def test_random_weights_have_the_architecture_of_the_encoder_they_are_compared_with(tmp_path: Path) -> None:
    """Layer scale and registers in classification; in detection what a config has a place for."""
    vit = build_vit("tiny", image_size=32, patch_size=8, layer_scale=1.0, norm_eps=1e-5, ffn="swiglu", mlp_ratio=2.0)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit).to_metadata())
    inits = [Init(name="pretrained", checkpoint=path), Init(name="random", checkpoint=None)]
    random = plan(tmp_path, inits=inits, seeds=[0], fractions=[1.0])[1]
    config = ROOT / "configs/classification/study_finetune.yaml"
    settings = ClassificationTask(config, [], inits).settings(random)
    architecture = {"layer_scale": 1.0, "norm_eps": 1e-5, "ffn": "swiglu", "mlp_ratio": 2.0}
    assert read_config(ClassificationConfig, config, settings).model.architecture == architecture
    pytest.importorskip("detectron2")
    from mae_transfer.detection.config import load_config

    config = ROOT / "configs/detection/tiny.py"
    cfg = load_config(config, DetectionTask(config, [], inits).settings(random))
    assert dict(cfg.model.encoder) == architecture


def test_the_curve_of_a_classification_is_its_metrics(encoder: Path, tmp_path: Path) -> None:
    task = ClassificationTask(ROOT / "configs/classification/study_linear.yaml", [], INITS[1:])
    run = Run(fraction=1.0, init=INITS[1], seed=0, folder=tmp_path)
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "val_top1": 3.5, "val_top5": 9.0}, {"step": 4, "val_top1": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert task.curves(run) == {"val_top1": [(2, 3.5), (4, 4.0)], "val_top5": [(2, 9.0)]}
    assert not task.is_finished(run)
    (tmp_path / "config.yaml").write_text("protocol: linear\n")
    (tmp_path / "per_class.csv").touch()
    assert not task.is_finished(run)
    (tmp_path / "model.safetensors").touch()
    assert task.is_finished(run)


BAD = [
    (["--init", "random"], "two starts"),
    (["--init", "random", "--init", "random"], "twice"),
    (["--init", "random", "--init", "a=missing.pth"], "missing.pth does not exist"),
    (["--init", "random", "--init", "missing.pth"], "NAME=CHECKPOINT"),
    (["--init", "random", "--init", "a=ENCODER", "--fractions", "25"], "--fractions 25"),
    (["--init", "random", "--init", "a=ENCODER", "--jobs", "0"], "at least 1"),
    (["--init", "random", "--init", "a=ENCODER", "train.seed=1"], "sets train.seed itself"),
    (["--init", "random", "--init", "a.b=ENCODER", "--seeds", "1", "2", "train.seed=1"], "sets train.seed itself"),
    (["--init", "random", "--init", "a=ENCODER", "dataset"], "cannot read 'dataset'"),
    (["--init", "random", "--init", "a=ENCODER", "train.max_itr=1"], "did you mean train.max_iter"),
    (["--init", "random", "--init", "a=ENCODER"], "dataset.train.json"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input_is_refused(
    words: list[str], said: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("detectron2")
    config = str(ROOT / "configs/detection/tiny.py")
    words = [word.replace("ENCODER", str(encoder)) for word in words]
    assert run_tool(main, ["detection", "--config-file", config, "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_comparison(tmp_path: Path) -> None:
    definition = {"overrides": ["a=1"], "inits": {"a": "x"}, "seeds": [0]}

    def claimed(folder: str, **change: object) -> None:
        claim(tmp_path / folder, {**definition, **change}, what="comparison", may_grow=("inits", "seeds"))

    claimed("out")
    claimed("out", seeds=[0, 1], inits={"a": "x", "b": "y"})
    claimed("out", inits={"b": "y"})
    for change, said in (({"overrides": ["a=2"]}, "overrides was"), ({"inits": {"b": "z"}}, "inits b was y, is z")):
        with pytest.raises(ValueError, match=f"another comparison: {said}"):
            claimed("out", **change)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="no comparison"):
        claimed("other")


@pytest.mark.slow
def test_two_starts_of_mask_rcnn(encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    from tests.detection.conftest import Scenes

    scenes = Scenes(tmp_path / "scenes", num_images=4, side=64)
    small = ["train.max_iter=4", "train.eval_period=2", "train.batch_size=1", "schedule.warmup_iters=1"]
    small += ["dataset.image_size=64", "dataset.workers=0", "model.channels=32", "model.rois_per_image=8"]
    command = [sys.executable, str(ROOT / "tools/compare_inits.py"), "detection", "--out", str(tmp_path / "out")]
    command += ["--config-file", str(ROOT / "configs/detection/tiny.py"), "--seeds", "0", "--fractions", "0.5", "1"]
    command += ["--init", f"ours={encoder}", "--init", "random", *scenes.overrides, *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 50 % | ours | 1 |" in done.stdout
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert len(content) == 4
    assert all([step for step, _ in entry["curves"]["segm/AP"]] == [2, 4] for entry in content)


BAD_SEGMENTATION = [
    (["train.seed=1"], "sets train.seed itself"),
    (["init_checkpoint=x.pth"], "sets init_checkpoint itself"),
    (["train.max_itr=1"], "did you mean train.max_iters"),
    (["dataset.root=missing"], "dataset.root missing is not a folder"),
]


@pytest.mark.parametrize(("words", "said"), BAD_SEGMENTATION, ids=[said for _, said in BAD_SEGMENTATION])
def test_bad_input_of_segmentation_is_refused(
    words: list[str], said: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mmseg")
    command = ["segmentation", "--config-file", str(ROOT / "configs/segmentation/upernet_tiny.py")]
    command += ["--out", str(tmp_path / "out"), "--init", "random", "--init", f"a={encoder}", *words]
    assert run_tool(main, command) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_starts_of_upernet(encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    from tests.segmentation.conftest import write_folder

    root = write_folder(tmp_path / "data", num_train=4, num_val=2)
    small = ["train.max_iters=4", "train.val_interval=2", "train.batch_size=2", "dataset.workers=0"]
    small += ["dataset.crop_size=64", "head.channels=16", "dataset.reduce_zero_label=False", f"dataset.root={root}"]
    command = [sys.executable, str(ROOT / "tools/compare_inits.py"), "segmentation", "--out", str(tmp_path / "out")]
    command += ["--config-file", str(ROOT / "configs/segmentation/upernet_tiny.py"), "--seeds", "0"]
    command += ["--fractions", "0.5", "1", "--init", f"ours={encoder}", "--init", "random", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 50 % | ours | 1 |" in done.stdout
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [[step for step, _ in entry["curves"]["mIoU"]] for entry in content] == [[2, 4]] * 4
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "4 of 4 runs are finished already" in again.stderr


def test_a_changed_config_or_encoder_is_another_comparison(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, start = tmp_path / "config.yaml", tmp_path / "encoder.safetensors"
    start.write_bytes(encoder.read_bytes())
    config.write_text("protocol: linear\ndata: {train: a, val: b}\n", encoding="utf-8")
    monkeypatch.setattr("mae_transfer.study.cli.run_all", lambda *args, **options: None)
    command = ["classification", "--config-file", str(config), "--out", str(tmp_path / "out"), "--init", f"a={start}"]
    command += ["--init", "random"]
    assert run_tool(main, command) == 0
    assert run_tool(main, [*command, "--init", f"b={start}"]) == 0, "more starts may be added"
    before = start.read_bytes()
    vit = build_vit("tiny", patch_size=8, image_size=64)  # other random weights
    write_safetensors(start, vit.state_dict(), describe(vit).to_metadata())
    assert run_tool(main, command) == 2 and "init_sha256 a was" in capsys.readouterr().err
    start.write_bytes(before)
    config.write_text("protocol: linear\ndata: {train: a, val: b}\nmodel: {pool: mean}\n", encoding="utf-8")
    assert run_tool(main, command) == 2 and "config_sha256 was" in capsys.readouterr().err


@pytest.mark.slow
def test_neighbours_of_a_fine_tuned_encoder_without_norm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(num_classes=2, image_size=32, patch_size=8, width=32, depth=2, num_heads=2)
    start = tmp_path / "encoder.safetensors"
    write_safetensors(start, encoder_state(model.state_dict()), describe(model).to_metadata())
    for part in ("train", "val"):
        write_classes(tmp_path / part, classes=2)
    command = [sys.executable, str(ROOT / "tools/compare_inits.py"), "classification", "--out", str(tmp_path / "out")]
    command += ["--config-file", str(ROOT / "configs/classification/tiny_knn.yaml"), "--seeds", "0", "knn.k=[1,3]"]
    command += ["--init", f"ours={start}", "--init", "random", "data.image_size=32", "log.tensorboard=false"]
    command += [f"data.train={tmp_path / 'train'}", f"data.val={tmp_path / 'val'}", "data.workers=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 100 % | ours | 1 |" in done.stdout and "| 100 % | random | 1 |" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "2 of 2 runs are finished already" in again.stderr


def test_a_start_may_be_an_address() -> None:
    start = parse_init("vit=hf://someone/encoder@v2").checkpoint
    assert start is not None and is_address(start)
    with pytest.raises(CheckpointError, match=r"missing\.pth does not exist"):
        parse_init("vit=missing.pth")
