"""Classification runs as a user starts them: what they write, that they repeat, resume and refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mae_transfer import build_vit, load_backbone
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.classification.cli import main
from mae_transfer.classification.images import LabelledImages
from mae_transfer.classification.model import load_classifier
from mae_transfer.classification.objective import ClassificationRun, choose_by_class
from mae_transfer.data.find import open_source
from mae_transfer.engine.metrics import read_metrics
from mae_transfer.errors import run_tool
from tests.classification.small import write_classes
from tests.pretrain.small import timeless, wait_for

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "train_cls.py")]
CONFIGS = ROOT / "configs" / "classification"
COMMON = (
    *("data.image_size=32", "data.workers=0", "data.cache=none", "data.scan_cache=false", "model.patch_size=8"),
    *("model.width=32", "model.depth=2", "model.num_heads=2", "train.batch_size=8", "train.precision=fp32"),
    *("checkpoint.every_steps=3", "log.every_steps=1", "log.tensorboard=false", "log.evaluate_every_epochs=2"),
)
REPORT = ("config.yaml", "environment.txt", "metrics.jsonl", "confusion.png", "classes.json", "per_class.csv")


def arguments(protocol: str, classes: Path, run: Path, *more: str) -> list[str]:
    warm = [] if protocol == "knn" else ["optim.warmup_epochs=0.5"]
    own_length = protocol == "knn" or any(part.startswith("train.epochs") for part in more)
    steps = [] if own_length else ["train.steps=8"]
    config = str(CONFIGS / f"tiny_{protocol}.yaml")
    places = [f"data.train={classes / 'train'}", f"data.val={classes / 'val'}", f"run.dir={run}"]
    return [config, *COMMON, *warm, *steps, *places, *more]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vit = build_vit(size="tiny", width=32, depth=2, num_heads=2, patch_size=8, image_size=32)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit, mean=(0.5,) * 3, std=(0.25,) * 3).to_metadata())
    return path


@pytest.fixture(scope="module")
def finetuned(classes: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finetuned") / "run"
    more = (f"init_checkpoint={encoder}", "train.ema=0.9", "train.accumulate=2")
    assert run_tool(main, arguments("finetune", classes, run, *more)) == 0
    return run


def test_what_a_run_leaves_behind(finetuned: Path, classes: Path) -> None:
    assert all((finetuned / name).is_file() for name in REPORT)
    lines = read_metrics(finetuned / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "val_top1" in line] == [6, 8]  # 24 images: 3 steps an epoch
    assert {"val_top1", "val_top5", "val_loss", "lr", "loss", "images_per_second"} <= set(lines[-1])
    assert json.loads((finetuned / "classes.json").read_text()) == [f"class-{number}" for number in range(4)]
    with safe_open(finetuned / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"])[0] == "class-0" and metadata["protocol"] == "finetune"
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5], "the encoder's own normalisation goes on with it"
    vit = build_vit(size="tiny", width=32, depth=2, num_heads=2, patch_size=8, image_size=32, final_norm=False)
    load_backbone(vit, finetuned)
    model = load_file(finetuned / "model.safetensors")
    assert torch.equal(vit.blocks[1].mlp.fc2.weight, model["blocks.1.mlp.fc2.weight"])
    assert not torch.equal(load_file(finetuned / "model_ema.safetensors")["head.weight"], model["head.weight"])
    assert [path.name for path in finetuned.iterdir() if path.is_dir()] == ["checkpoints"], (
        "none that it has no use for"
    )


def test_evaluating_it_again(finetuned: Path, classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "tiny_finetune.yaml")
    more = [f"data.val={classes / 'val'}", "data.image_size=32", "data.workers=0", "train.precision=fp32"]
    assert run_tool(main, [config, *more, "--evaluate", str(finetuned)]) == 0
    top1 = read_metrics(finetuned / "metrics.jsonl")[-1]["val_top1"]
    assert f"{top1:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(("blocks", "frozen"), [("1", "blocks.0"), ("0", "blocks")])
def test_partial_leaves_the_rest_alone(blocks: str, frozen: str, classes: Path, encoder: Path, tmp_path: Path) -> None:
    more = (f"init_checkpoint={encoder}", f"partial.blocks={blocks}", "train.steps=2")
    assert run_tool(main, arguments("partial", classes, tmp_path / "run", *more)) == 0
    before, after = load_file(encoder), load_file(tmp_path / "run" / "model.safetensors")
    untouched = [name for name in before if name.startswith((f"{frozen}.", "patch_embed", "cls_token", "pos_embed"))]
    assert len(untouched) > 10 and all(torch.equal(after[name], before[name]) for name in untouched)
    if blocks == "1":
        assert not torch.equal(after["blocks.1.attn.qkv.weight"], before["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("kind", ["none", "crop"])
def test_linear_probe_leaves_the_encoder_alone(kind: str, classes: Path, encoder: Path, tmp_path: Path) -> None:
    """On features computed once and on augmented images; the norm stays the pretrained one."""
    more = (f"init_checkpoint={encoder}", f"augment.kind={kind}", "train.steps=6")
    assert run_tool(main, arguments("linear", classes, tmp_path / "run", *more)) == 0
    before, after = load_file(encoder), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert int(after["head.0.num_batches_tracked"]) == 6 and after["head.0.running_mean"].any()
    assert after["head.1.bias"].any(), "which starts at zero"
    loaded = load_classifier(tmp_path / "run")
    assert loaded.model.probe and loaded.model.pool == "cls"


def test_cached_features_train_as_images_do(classes: Path, encoder: Path, tmp_path: Path) -> None:
    """Against the same images seen anew in every step, by a linear probe that does not cache."""
    more = (f"init_checkpoint={encoder}", "optim.base_lr=10")
    assert run_tool(main, arguments("linear", classes, tmp_path / "cached", *more)) == 0

    def uncached(run: ClassificationRun) -> object:
        return LabelledImages(run.source, run.labels, config=run.config, seed=run.config.run.seed)

    with patch.object(ClassificationRun, "_make_dataset", uncached):
        assert run_tool(main, arguments("linear", classes, tmp_path / "anew", *more)) == 0
    for ours, theirs in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("cached", "anew"))):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_fine_tuned_encoder_keeps_its_norm_of_averaged_patches(
    classes: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder and its classifier are one start, and a probe sees what the fine-tuned head saw."""
    init = f"init_checkpoint={finetuned}"
    whole = load_classifier(finetuned)
    for name, start in (("folder", finetuned), ("file", finetuned / "model.safetensors")):
        assert run_tool(main, arguments("linear", classes, tmp_path / name, f"init_checkpoint={start}")) == 0
        probe = load_classifier(tmp_path / name)
        assert probe.model.probe and probe.model.pool == "mean"
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(probe.model.encode(images), whole.model.encode(images))
    again = arguments("partial", classes, tmp_path / "again", init, "optim.base_lr=1e-12", "augment.kind=crop")
    assert run_tool(main, again) == 0
    norm = load_file(tmp_path / "again" / "encoder.safetensors")["fc_norm.weight"]
    torch.testing.assert_close(norm, whole.model.fc_norm.weight.data)
    assert not torch.equal(norm, torch.ones_like(norm))
    capsys.readouterr()
    assert run_tool(main, arguments("knn", classes, tmp_path / "cls", init, "model.pool=cls")) == 2
    assert "was fine-tuned on averaged patches and has no norm for its cls token" in capsys.readouterr().err


def test_nearest_neighbours(classes: Path, encoder: Path, tmp_path: Path) -> None:
    more = (f"init_checkpoint={encoder}", "knn.k=[1,5]", "train.accumulate=3")  # which does not divide the batch
    assert run_tool(main, arguments("knn", classes, tmp_path / "run", *more)) == 0
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {"knn_top1_k1", "knn_top1_k5", "val_top1", "val_top5"} <= set(line)
    assert all((tmp_path / "run" / name).is_file() for name in REPORT)
    assert not any(path.is_dir() for path in (tmp_path / "run").iterdir())
    assert run_tool(main, arguments("knn", classes, tmp_path / "run", *more)) == 2, "the folder is not empty"


def test_dry_run(
    classes: Path, encoder: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (f"init_checkpoint={encoder}", "partial.blocks=0.5", "log.peak_gflops=100", "--dry-run")
    assert run_tool(main, arguments("partial", classes, tmp_path / "run", *more)) == 0
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    model = load_file(finetuned / "model.safetensors")
    count = sum(tensor.numel() for tensor in model.values())
    trained = [name for name in model if name.startswith(("blocks.1.mlp", "blocks.1.norm2", "fc_norm", "head"))]
    part = sum(model[name].numel() for name in trained)
    assert f"{count / 1e6:.2f} M parameters ({part / 1e6:.2f} M train); partial, the last 0.5 of 2 blocks" in text
    assert "24 images, 8 steps of 8" in text and "classes          4; 12 images to test on" in text
    assert "2 x evaluation" in text and "of the given 100 (MFU)" in text


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TOOL, *command], stderr=subprocess.PIPE, text=True, env=environment)


class Died(Exception):
    """In place of a power cut."""


def test_resumed_to_the_last_bit(classes: Path, encoder: Path, tmp_path: Path) -> None:
    """Augmentation, mixup, drop path and average included; it goes on from the newest whole state."""
    more = (f"init_checkpoint={encoder}", "train.ema=0.9", "model.drop_path=0.3")
    assert run_tool(main, arguments("finetune", classes, tmp_path / "whole", *more)) == 0
    loss, calls = ClassificationRun.loss, []

    def dies(self: ClassificationRun, *given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 6:
            raise Died
        return loss(self, *given)  # type: ignore[arg-type]

    with patch.object(ClassificationRun, "loss", dies), pytest.raises(Died):
        main(arguments("finetune", classes, tmp_path / "parts", *more))
    assert run_tool(main, arguments("finetune", classes, tmp_path / "parts", *more, "run.resume=auto")) == 0
    assert_same_to_the_last_bit(tmp_path / "parts", tmp_path / "whole")


def assert_same_to_the_last_bit(ours: Path, theirs: Path) -> None:
    assert timeless(ours / "metrics.jsonl") == timeless(theirs / "metrics.jsonl")
    for name in ("model", "encoder", "model_ema"):
        one, other = load_file(ours / f"{name}.safetensors"), load_file(theirs / f"{name}.safetensors")
        assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.slow
def test_killed_and_resumed_to_the_last_bit(classes: Path, encoder: Path, tmp_path: Path) -> None:
    more = (f"init_checkpoint={encoder}", "train.ema=0.9", "train.steps=30", "log.evaluate_every_epochs=4")
    torch.set_num_threads(1)
    assert run_tool(main, arguments("finetune", classes, tmp_path / "whole", *more)) == 0
    process = start(arguments("finetune", classes, tmp_path / "parts", *more))
    state = tmp_path / "parts" / "checkpoints" / "step-00000006.pt"
    wait_for(state.exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert run_tool(main, arguments("finetune", classes, tmp_path / "parts", *more, "run.resume=auto")) == 0
    assert_same_to_the_last_bit(tmp_path / "parts", tmp_path / "whole")


def test_a_continuation_is_the_same_run(finetuned: Path, classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        ("optim.layer_decay=0.5", "optim.layer_decay was 0.75, is 0.5"),
        ("train.accumulate=1", "train.accumulate was 2, is 1"),  # other images would be mixed
    ):
        more = ("run.resume=auto", "train.accumulate=2", given)
        assert run_tool(main, arguments("finetune", classes, finetuned, *more)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.train=null"], "data.train is not set"),
        (["data.val=null"], "data.val is not set"),
        (["init_checkpoint=nowhere.pth"], "nowhere.pth does not exist"),
        (["train.batch_size=7"], "micro-batch has 7"),
        (["protocol=linear", "optim.warmup_epochs=0", "train.batch_size=1"], "needs two or more"),
        (["model.num_classes=3"], "unknown key model.num_classes"),
    ],
)
def test_mistakes_leave_no_folder(
    more: list[str], message: str, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(main, arguments("finetune", classes, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_classes_that_only_the_validation_images_have(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "val", classes=2, first=3, images=1)
    more = (f"data.val={tmp_path / 'val'}",)
    assert run_tool(main, arguments("finetune", classes, tmp_path / "run", *more)) == 2
    assert "class-4" in capsys.readouterr().err


def test_a_share_of_each_class(classes: Path, tmp_path: Path) -> None:
    source = open_source([classes / "train"], cache=None)
    assert source.labels is not None
    half = choose_by_class(source, source.labels, 0.5, seed=0)
    third = choose_by_class(source, source.labels, 1 / 3, seed=0)
    assert [int((source.labels[half] == number).sum()) for number in range(4)] == [3] * 4
    assert set(third) < set(half) and len(third) == 8 and sorted(half) == list(half)
    assert list(choose_by_class(source, source.labels, 0.5, seed=1)) != list(half)
    elsewhere = open_source([write_classes(tmp_path / "elsewhere" / "copy")], cache=None)
    assert elsewhere.labels is not None
    assert list(choose_by_class(elsewhere, elsewhere.labels, 0.5, seed=0)) == list(half), "names count, not places"


def test_a_share_does_not_depend_on_how_paths_are_given(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two folders, one by its whole path and one from here."""
    write_classes(tmp_path / "more", seed=2)
    shutil.copytree(classes / "train", tmp_path / "train")
    monkeypatch.chdir(tmp_path)
    chosen = []
    for roots in ([tmp_path / "more", tmp_path / "train"], [tmp_path / "more", "train"], ["more", "./train"]):
        source = open_source([Path(root) for root in roots], cache=None)
        assert source.labels is not None
        indices = choose_by_class(source, source.labels, 0.5, seed=0)
        chosen.append([Path(source.name(int(index))).resolve() for index in indices])
    assert chosen[0] == chosen[1] == chosen[2] and len(chosen[0]) == 24


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (["train.steps=12", "data.fraction=0.1", "train.batch_size=4"], [3, 6, 9, 12]),  # an epoch is a step
        (["train.steps=4", "data.fraction=0.1", "train.batch_size=12"], [1, 2, 3, 4]),
        (["train.steps=6", "train.batch_size=8"], [3, 6]),  # an epoch
    ],
)
def test_testing_takes_less_than_training(given: list[str], steps: list[int], classes: Path, tmp_path: Path) -> None:
    """12 images to test on: not before 12 were trained on, however short an epoch is."""
    more = ("log.evaluate_every_epochs=1", *given)
    assert run_tool(main, arguments("finetune", classes, tmp_path / "run", *more)) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val_top1" in line] == steps


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("protocol", ["finetune", "partial", "linear"])
def test_two_processes_train_as_one(protocol: str, strategy: str, classes: Path, encoder: Path, tmp_path: Path) -> None:
    """Without mixing, whose pairs are those of a micro-batch; the linear probe's statistics are of the whole batch."""
    more = [f"init_checkpoint={encoder}", "train.ema=0.9", f"train.distributed={strategy}"]
    more += ["optim.base_lr=10"] if protocol == "linear" else ["augment.mixup=0", "augment.cutmix=0"]
    more += ["optim.name=adamw", "optim.base_lr=0.01"] if (protocol, strategy) == ("linear", "fsdp2") else []
    more += ["model.drop_path=0"]
    assert run_tool(main, arguments(protocol, classes, tmp_path / "one", *more)) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TOOL[1]]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments(protocol, classes, tmp_path / "two", *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (timeless(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for ours, theirs in zip(two, one, strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), (name, ours["step"])
    for name in ("model", "model_ema"):
        ours, theirs = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("two", "one"))
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)
