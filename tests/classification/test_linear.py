"""A linear probe from its config to its files, against a plain loop with timm's LARS on features computed apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.optim import Lars
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mae_transfer.checkpoint import write_safetensors
from mae_transfer.classification.config import (
    AugmentSection,
    ClassificationConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimSection,
    TrainConfig,
)
from mae_transfer.classification.model import load_classifier
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.classification.robustness import evaluate_checkpoint
from mae_transfer.classification.run import classify
from mae_transfer.data.sampler import StepSampler
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.run_folder import RunConfig
from mae_transfer.vit import build_vit
from tests.classification.small import PATCH, SIZE, small_info, write_classes

ALONE = Processes(device=torch.device("cpu"))
BATCH, STEPS, RATE = 16, 6, 5.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("linear")
    torch.manual_seed(3)
    encoder = build_vit("tiny", image_size=SIZE, patch_size=PATCH, width=32, depth=2, num_heads=2)
    for parameter in encoder.parameters():  # features that differ between images
        nn.init.normal_(parameter, std=0.3)
    write_safetensors(root / "encoder.safetensors", encoder.state_dict(), small_info(encoder).to_metadata())  # type: ignore[arg-type]
    return {
        "encoder": root / "encoder.safetensors",
        "train": write_classes(root / "train", images=8),
        "val": write_classes(root / "val", images=4, seed=1),
        "part": write_classes(root / "part", classes=2, first=1, seed=2),
        "run": root / "run",
    }


def config(folders: dict[str, Path], **run: object) -> ClassificationConfig:
    return ClassificationConfig(
        protocol="linear",
        init_checkpoint=str(folders["encoder"]),
        data=DataConfig(
            train=str(folders["train"]), val=str(folders["val"]), image_size=SIZE, workers=0, scan_cache=False
        ),
        model=ModelConfig(),
        augment=AugmentSection(kind="none"),
        train=TrainConfig(steps=STEPS, batch_size=BATCH, precision="fp32", device="cpu"),
        optim=OptimSection(base_lr=RATE * 256 / BATCH, warmup_epochs=1),
        log=LogConfig(every_steps=1, tensorboard=False, peak_gflops=1.0),
        run=RunConfig(**{"dir": str(folders["run"]), "overwrite": True, **run}),  # type: ignore[arg-type]
    )


@torch.no_grad()
def features(folder: Path, encoder: nn.Module) -> tuple[Tensor, Tensor]:
    pipeline = transforms.Compose(
        [
            transforms.Resize(int(SIZE / (224 / 256)), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)),
        ]
    )
    data = ImageFolder(str(folder), pipeline)
    return torch.cat([encoder(image[None])[:, 0] for image, _ in data]), torch.tensor(data.targets)


def test_trains_as_a_plain_loop_with_timms_lars(folders: dict[str, Path]) -> None:
    assert classify(config(folders), ALONE) is None
    found = load_file(folders["run"] / "model.safetensors")

    encoder = build_vit("tiny", image_size=SIZE, patch_size=PATCH, width=32, depth=2, num_heads=2).eval()
    encoder.load_state_dict(load_file(folders["encoder"]))
    x, labels = features(folders["train"], encoder)
    norm, head = nn.BatchNorm1d(32, affine=False, eps=1e-6), nn.Linear(32, 4)
    start = first_head(folders)
    head.load_state_dict(start)
    # As the released probe's optimiser: the trust ratio for the weight although it is not decayed, never for the bias.
    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias]}]
    optimizer = Lars(groups, lr=1.0, momentum=0.9)
    sampler = StepSampler(num_samples=32, batch_size=BATCH, seed=0, stop_step=STEPS)
    losses = []
    for step in range(STEPS):
        rate = RATE * step / 2 if step < 2 else RATE * 0.5 * (1 + np.cos(np.pi * (step - 2) / (STEPS - 2)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = [key.index for key in sampler.global_batch(step)]
        loss = F.cross_entropy(head(norm(x[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    lines = [json.loads(line) for line in (folders["run"] / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-5)
    torch.testing.assert_close(found["head.1.weight"], head.weight.detach(), rtol=1e-3, atol=1e-6)
    assert (head.weight - start["weight"]).abs().max() > 1e-4  # it did learn
    torch.testing.assert_close(found["head.0.running_mean"], norm.running_mean, rtol=1e-3, atol=1e-4)

    unseen, truth = features(folders["val"], encoder)
    logits = head(norm.eval()(unseen))
    assert lines[-1]["val_top1"] == pytest.approx(100 * (logits.argmax(1) == truth).double().mean().item())
    assert lines[-1]["val_loss"] == pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-3)
    for name in ("confusion.png", "per_class.csv", "classes.json", "encoder.safetensors"):
        assert (folders["run"] / name).is_file()
    after = load_file(folders["run"] / "encoder.safetensors")
    before = load_file(folders["encoder"])
    assert all(torch.equal(after[name], before[name]) for name in after)


def first_head(folders: dict[str, Path]) -> dict[str, Tensor]:
    """The head as a run draws it."""
    run = ClassificationRun(config(folders), ALONE)
    return {name: tensor.clone() for name, tensor in run.model.head[1].state_dict().items()}  # type: ignore[index]


def test_the_run_is_evaluated_on_other_folders_from_its_files_alone(folders: dict[str, Path]) -> None:
    if not (folders["run"] / "model.safetensors").is_file():
        classify(config(folders), ALONE)
    given = config(folders)
    data = replace(given.data, train=None, val=[str(folders["val"]), str(folders["part"])])
    text = evaluate_checkpoint(replace(given, data=data, init_checkpoint=None), str(folders["run"]), ALONE)
    lines = text.splitlines()
    last = json.loads((folders["run"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['val_top1']:7.2f} {last['val_top5']:7.2f} {last['val_loss']:7.4f}" in lines[2]
    assert "4 classes; images of 32x32 pixels, 87.5% of the resized image's side" in lines[0]
    assert lines[3].split()[:2] == ["12", "2"] and str(folders["part"]) in lines[3]
    assert load_classifier(folders["run"]).classes == [f"class-{number}" for number in range(4)]
