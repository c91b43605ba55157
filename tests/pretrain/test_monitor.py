"""The online linear probe, and what processes share of evaluation."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_transfer.data.batches import UnreadableCount
from mae_transfer.data.choice import matching_labels, shares
from mae_transfer.data.find import open_source
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.precision import Precision
from mae_transfer.errors import ConfigError, run_tool
from mae_transfer.probe import fit_probe, top_accuracies
from pretrain.cli import main
from pretrain.evaluate import encode_images, evaluate_loss
from pretrain.load import load_mae
from pretrain.masking import build_sampler
from tests.engine.test_wandb import Server
from tests.pictures import picture, write_pictures
from tests.pretrain.small import ARGUMENTS, timeless

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "pretrain" / "tiny.yaml")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours, a folder a class: train 10 each, val 4 each (of two classes only)."""
    root = tmp_path_factory.mktemp("classes")
    for split, count, names in (("train", 10, ("blue", "green", "red")), ("val", 4, ("green", "red"))):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for seed in range(count):
                pixels = np.asarray(picture(seed + 100 * (split == "val"))) // 3
                pixels[..., ("red", "green", "blue").index(name)] += 150
                Image.fromarray(pixels).save(root / split / name / f"{seed}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 12)


def arguments(pictures: Path, run: Path, *more: str) -> list[str]:
    return [TINY, f"data.path={pictures}", f"run.dir={run}", *ARGUMENTS, "train.steps=9", *more]


def probing(classes: Path, *more: str) -> tuple[str, ...]:
    return (f"probe.train_path={classes / 'train'}", f"probe.val_path={classes / 'val'}", "probe.every_epochs=2", *more)


@pytest.fixture(scope="module")
def probed(pictures: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("probed") / "run"
    assert run_tool(main, arguments(pictures, run, *probing(classes))) == 0
    return run


def without_probe(run: Path) -> list[dict[str, Any]]:
    lines = timeless(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("probe")} for line in lines]


def test_probe_is_in_the_metrics_and_tells_colours_apart(probed: Path) -> None:
    lines = [json.loads(line) for line in (probed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "probe_top1" in line] == [3, 6, 9]
    last = lines[-1]
    assert last["probe_top1"] >= 75 and last["probe_top5"] == 100 and 0 < last["probe_seconds"] < 60


def test_a_run_is_the_same_with_and_without_it(probed: Path, pictures: Path, tmp_path: Path) -> None:
    assert run_tool(main, arguments(pictures, tmp_path / "run")) == 0
    assert without_probe(probed) == without_probe(tmp_path / "run")


def test_resumed_to_the_last_bit(probed: Path, pictures: Path, classes: Path, tmp_path: Path) -> None:
    """What the probe said after the restart is what it said without one: it keeps nothing."""
    more = probing(classes, f"run.resume={probed / 'checkpoints' / 'step-00000006.pt'}")
    assert run_tool(main, arguments(pictures, tmp_path / "run", *more)) == 0

    def accuracies(run: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["probe_top1"]) for line in lines if "probe_top1" in line]

    assert accuracies(tmp_path / "run") == accuracies(probed)
    assert without_probe(tmp_path / "run") == without_probe(probed)


def test_it_is_the_probe_of_the_cls_token(probed: Path, classes: Path) -> None:
    """The last line's accuracy from the finished weights, images read and cut by Pillow."""
    loaded = load_mae(probed)
    parts = []
    for split in ("train", "val"):
        files = sorted((classes / split).rglob("*.png"))
        images = []
        for file in files:
            image = Image.open(file)  # 48 x 40: the largest centred square is 40
            image = image.resize((16, 16), Image.Resampling.BICUBIC, box=(4, 0, 44, 40))
            images.append(np.asarray(image, np.float32) / 255)
        x = (np.stack(images) - np.array(loaded.info.mean)) / np.array(loaded.info.std)
        with torch.no_grad():
            features = loaded.model.forward_features(torch.from_numpy(x).float().permute(0, 3, 1, 2))[:, 0]
        names = [file.parent.name for file in files]
        parts.append((features, torch.tensor([["blue", "green", "red"].index(name) for name in names])))
    (train, labels), (val, truth) = parts
    expected = top_accuracies(fit_probe(train, labels, num_classes=3).logits(val), truth)[0]
    last = json.loads((probed / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["probe_top1"] == pytest.approx(expected, abs=12.6)  # one image of eight: pixels differ by rounding


def test_labels_of_val_are_numbered_as_those_of_train(classes: Path) -> None:
    train, val = open_source([classes / "train"]), open_source([classes / "val"])
    keys = ("probe.train_path", "probe.val_path")
    own, unseen = matching_labels(train, val, keys=keys)
    assert own.tolist() == [0] * 10 + [1] * 10 + [2] * 10 and unseen.tolist() == [1] * 4 + [2] * 4
    with pytest.raises(ConfigError, match=r"classes that probe\.train_path lacks: blue"):
        matching_labels(val, train, keys=keys)


def test_a_folder_without_classes_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = (f"probe.train_path={pictures}", f"probe.val_path={pictures}")
    assert run_tool(main, arguments(pictures, tmp_path / "run", *paths)) == 2
    assert "a folder of images for each class" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed_is_said_before_anything_is_written(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run_tool(main, arguments(pictures, tmp_path / "run", "log.wandb=mae")) == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_in_its_wandb_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    run = tmp_path / "run"
    command = arguments(pictures, run, "log.wandb=mae", "run.resume=auto")
    assert run_tool(main, command) == 0
    newest = max((run / "checkpoints").iterdir())
    if newest.is_dir():
        shutil.rmtree(newest)
    else:
        newest.unlink()
    (run / "encoder.safetensors").unlink()
    assert run_tool(main, command) == 0  # from step 6 on
    (rows,) = server.rows.values()
    assert sorted(rows) == list(range(1, 10)) and rows[9]["loss"] > 0 and "images_per_second" in rows[9]
    assert len(server.calls) == 2 and server.calls[0]["config"]["model"]["width"] == 32


@pytest.mark.parametrize("count", [1, 5, 64, 65, 130, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_process_takes_as_many_batches_and_every_image_counts_once(count: int, world_size: int) -> None:
    def of(rank: int) -> Iterator[tuple[range, bool]]:
        return shares(count, Processes(device=CPU, rank=rank, world_size=world_size))

    batches = [list(of(rank)) for rank in range(world_size)]
    assert len({len(own) for own in batches}) == 1
    assert all(len(places) > 0 for own in batches for places, _ in own)
    assert sorted(i for own in batches for places, counts in own if counts for i in places) == list(range(count))


_WORKER = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method
from pathlib import Path
from mae_transfer.data.batches import UnreadableCount
from mae_transfer.data.choice import matching_labels, shares
from mae_transfer.data.find import open_source
from mae_transfer.engine.distribution import processes
from mae_transfer.engine.parallel import parallelise
from mae_transfer.engine.precision import Precision
from pretrain.evaluate import encode_images, evaluate_loss
from mae_transfer.data.batches import UnreadableCount
from pretrain.load import load_mae
from pretrain.masking import build_sampler
from pretrain.reconstruct import save_training_reconstructions

run, images, out = map(Path, sys.argv[1:4])
with processes("cpu") as group, torch.no_grad():
    model = load_mae(run).model
    parallelise(model, group, strategy=sys.argv[4])
    if sys.argv[4] == "fsdp2":
        register_fsdp_forward_method(model, "forward_features")
    source = open_source([images])
    common = dict(mean=[.5] * 3, std=[.2] * 3, precision=Precision("fp32", group.device), seed=3, processes=group,
                  indices=range(len(source)), unreadable=UnreadableCount(num_samples=len(source), limit=0))
    features = encode_images(model, source, **common)
    loss = evaluate_loss(model, source, sampler=build_sampler("random", model.grid, .75), **common)
    torch.manual_seed(0)
    save_training_reconstructions(model, torch.randn(2, 3, 16, 16), torch.rand(2, 16), mean=[.5] * 3, std=[.2] * 3,
                                  path=out / "picture.png" if group.is_main else None)
    torch.save({"features": features, "loss": loss}, out / f"{group.rank}.pt")
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_share_the_images(probed: Path, classes: Path, tmp_path: Path, strategy: str) -> None:
    """Both get what one alone gets, under FSDP2 too, where every forward pass needs both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "worker.py").write_text(_WORKER)
    command = [
        sys.executable,
        str(tmp_path / "worker.py"),
        str(probed),
        str(classes / "train"),
        str(tmp_path),
        strategy,
    ]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in started:
        try:
            errors = process.communicate(timeout=120)[1]
        finally:
            process.kill()
        assert process.returncode == 0, errors
    source, model = open_source([classes / "train"]), load_mae(probed).model
    common: dict[str, Any] = {
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "precision": Precision("fp32", CPU),
        "seed": 3,
        "processes": Processes(device=CPU),
        "indices": range(len(source)),
        "unreadable": UnreadableCount(num_samples=len(source), limit=0),
    }
    features = encode_images(model, source, **common)
    loss = evaluate_loss(model, source, sampler=build_sampler("random", model.grid, 0.75), **common)
    for rank in range(2):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(theirs["features"], features, rtol=0, atol=1e-5)
        assert theirs["loss"] == pytest.approx(loss, rel=1e-5)
    assert (tmp_path / "picture.png").is_file()
