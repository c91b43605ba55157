"""configs/classification/README.md: its commands have keys that exist, run at the smallest size, and its links lead
somewhere."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from mae_transfer.checkpoint import write_safetensors
from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.engine.config import read_config
from mae_transfer.vit import build_vit
from tests.classification.small import small_info, write_classes
from tests.readme import check_links, commands, run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "classification"
README = FOLDER / "README.md"
STUDIES = {  # what makes the other tools' commands small: nothing is trained for the study (tests/study does)
    "tools/compare_inits.py": "--seeds 0 train.epochs=1 train.batch_size=8 optim.warmup_epochs=0 log.tensorboard=false",
    "tools/study.py": "--results",
}
SMALLER = ("train.epochs=1", "train.batch_size=8", "optim.warmup_epochs=0", "log.tensorboard=false")


def test_commands_have_keys_that_exist_and_links_lead_somewhere() -> None:
    every = [shlex.split(command) for command in commands(README)]
    lines = [line for line in every if line[1] not in STUDIES]
    assert len(lines) >= 4 and {line[1] for line in every if line not in lines} == set(STUDIES)
    for line in lines:
        assert line[:2] == ["python", "tools/train_cls.py"]
        read_config(ClassificationConfig, str(ROOT / line[2]), [part for part in line[3:] if "=" in part])
    check_links(README)


def test_every_config_is_in_the_table_and_every_file_of_the_table_exists() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(\w+\.yaml)`", row)} - {"config.yaml"}
    assert named == {path.name for path in FOLDER.glob("*.yaml") if not path.name.startswith("study")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*_knn.yaml")), ids=lambda path: path.stem)
def test_configs_of_neighbours(path: Path) -> None:
    config = read_config(ClassificationConfig, str(path), ["data.train=a", "data.val=b"]).resolved()
    assert (config.protocol, config.model.pool, config.augmentation.kind) == ("knn", "cls", "none")
    assert config.knn.temperature == 0.07 and config.model.size == path.stem.removesuffix("_knn")


@pytest.mark.slow
def test_every_command_is_executed(tmp_path: Path) -> None:
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    photos = tmp_path / "datasets" / "photos"
    for name, images in (("train", 6), ("val", 3)):
        write_classes(photos / name, images=images)
    write_classes(photos / "part", classes=2, images=3, first=1)
    (tmp_path / "datasets" / "tiny-imagenet").symlink_to(photos)
    (photos / "unlabelled").symlink_to(photos / "train")
    torch.manual_seed(0)
    encoder = build_vit("tiny", image_size=64, patch_size=8)
    (tmp_path / "runs" / "pretrain-tiny").mkdir(parents=True)
    metadata = small_info(encoder).to_metadata()  # type: ignore[arg-type]
    write_safetensors(tmp_path / "runs" / "pretrain-tiny" / "encoder.safetensors", encoder.state_dict(), metadata)
    for command in commands(README):
        line = shlex.split(command)
        smaller = list(SMALLER) if "_knn" not in command and "--evaluate" not in command else []
        if "_knn" in command:
            smaller = ["knn.k=[3]"]
        if line[1] in STUDIES:
            smaller = STUDIES[line[1]].split()
        run([sys.executable, *line[1:], *smaller], tmp_path)
    for name in ("finetune", "linear", "knn"):
        assert (tmp_path / "runs" / name / "confusion.png").is_file()
    assert "| 100 % | pretrained | 1 |" in (tmp_path / "runs" / "compare" / "results.md").read_text(encoding="utf-8")
