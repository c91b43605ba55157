"""Evaluation, features and neighbours shared by two processes (torchrun, gloo): the numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from mae_transfer.checkpoint import write_safetensors
from mae_transfer.vit import build_vit
from tests.classification.small import PATCH, SIZE, small_info, write_classes

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "train_cls.py")


def start(folder: Path, number: int, *arguments: str) -> str:
    """The tool in ``number`` processes; what it printed."""
    program = [sys.executable]
    if number > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*program, TOOL, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = build_vit("tiny", image_size=SIZE, patch_size=PATCH, width=32, depth=2, num_heads=2)
    for parameter in encoder.parameters():  # features that differ between images
        nn.init.normal_(parameter, std=0.3)
    write_safetensors(tmp_path / "encoder.safetensors", encoder.state_dict(), small_info(encoder).to_metadata())  # type: ignore[arg-type]
    # Numbers of images that neither two processes nor batches divide.
    train, val = write_classes(tmp_path / "train", images=9), write_classes(tmp_path / "val", images=7, seed=1)
    common = [f"data.train={train}", f"data.val={val}", f"data.image_size={SIZE}", "data.scan_cache=false"]
    common += ["train.device=cpu", "train.precision=fp32", "log.tensorboard=false", "model.size=null"]
    common += ["model.patch_size=null", "data.cache=none", f"init_checkpoint={tmp_path / 'encoder.safetensors'}"]

    def numbers(protocol: str, number: int, more: Sequence[str]) -> list[dict[str, float]]:
        config = str(ROOT / "configs" / "classification" / f"tiny_{protocol}.yaml")
        folder = tmp_path / f"{protocol}-{number}"
        start(tmp_path, number, config, *common, *more, f"run.dir={folder}")
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    one, two = (numbers("knn", number, ["knn.k=[3,10]"]) for number in (1, 2))
    for key in ("val_top1", "val_top5", "knn_top1_k3", "knn_top1_k10"):
        assert one[-1][key] == two[-1][key]
    more = ["train.batch_size=12", "train.epochs=3", "optim.warmup_epochs=0", "log.every_steps=1"]
    one, two = (numbers("linear", number, more) for number in (1, 2))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)
    for key in ("val_top1", "val_top5"):
        assert one[-1][key] == two[-1][key]
    assert one[-1]["val_loss"] == pytest.approx(two[-1]["val_loss"], rel=1e-4)
    tables = [(tmp_path / f"linear-{number}" / "per_class.csv").read_text() for number in (1, 2)]
    assert tables[0] == tables[1] and tables[0].count("\n") == 5
    config = str(ROOT / "configs" / "classification" / "tiny_linear.yaml")
    printed = [start(tmp_path, number, config, *common, "--evaluate", str(tmp_path / "linear-1")) for number in (1, 2)]
    assert printed[0] == printed[1] and f"{one[-1]['val_top1']:7.2f}" in printed[0]
