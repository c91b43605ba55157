"""A released detector: evaluated as it is, and as the start of a training on other categories."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset
from torch import nn

from mae_transfer.checkpoint import describe, encoder_state, write_safetensors
from mae_transfer.detection.config import build_augmentation, categories_of, load_config, resolve
from mae_transfer.detection.dataset import load_coco
from mae_transfer.detection.evaluation import CocoEvaluator
from mae_transfer.detection.loader import build_test_loader
from mae_transfer.detection.train import main
from mae_transfer.errors import CheckpointError
from mae_transfer.vit import build_vit
from tests.oracles import vitdet_keys

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "detection" / "tiny.py"
SMALL = [
    "dataset.image_size=64",
    "dataset.workers=0",
    "model.patch_size=16",
    "model.channels=16",
    "model.box_fc_width=32",
    "model.window_size=3",
    "model.anchor_sizes=[8,16,32,64,128]",
    "model.score_threshold=0.0",
    "schedule.warmup_iters=1",
    "train.device=cpu",
]


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=3, side=64)


@pytest.fixture
def val(scenes: Any) -> list[str]:
    return [f"dataset.val.json={scenes.json}", f"dataset.val.images={scenes.images}"]


@pytest.fixture
def released(scenes: Any, tmp_path: Path) -> tuple[nn.Module, Path]:
    cfg = resolve(load_config(CONFIG, [*scenes.overrides, *SMALL]))
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    arrays = {name: tensor.numpy() for name, tensor in vitdet_keys(model.state_dict()).items()}
    path = tmp_path / "model_final_61ccd1.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "ViTDet"}, protocol=2))
    return model, path


def test_a_release_is_evaluated_without_training_data(
    released: tuple[nn.Module, Path], val: list[str], tmp_path: Path
) -> None:
    model, path = released
    run = tmp_path / "run"
    given = ["--config-file", str(CONFIG), *SMALL, *val, f"train.init_checkpoint={path}", f"train.output_dir={run}"]
    assert main([*given, "--eval-only"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    cfg = resolve(load_config(CONFIG, [*SMALL, *val]), training=False)
    data = load_coco(cfg.dataset.val.json, cfg.dataset.val.images, categories=categories_of(cfg))
    evaluator = CocoEvaluator(data, max_dets=100, output_dir=tmp_path)
    expected = inference_on_dataset(model, build_test_loader(data, build_augmentation(cfg), num_workers=0), evaluator)
    assert result["iteration"] == 0
    assert (result["bbox"]["AP"], result["segm"]["AP"]) == (expected["bbox"]["AP"], expected["segm"]["AP"])


def test_what_is_no_detector_of_these_categories_is_not_evaluated(
    released: tuple[nn.Module, Path], val: list[str], scenes: Any, tmp_path: Path
) -> None:
    vit = build_vit("tiny", patch_size=16, image_size=32)
    encoder = tmp_path / "encoder.safetensors"
    write_safetensors(encoder, encoder_state(vit.state_dict()), describe(vit).to_metadata())
    given = ["--config-file", str(CONFIG), *SMALL, *val, f"train.output_dir={tmp_path / 'run'}", "--eval-only"]
    with pytest.raises(CheckpointError, match="names no whole detector"):
        main([*given, f"train.init_checkpoint={encoder}"])
    scenes.content["categories"].append({"id": 90, "name": "star"})
    scenes.write()
    with pytest.raises(CheckpointError, match="another number of categories than the 3 of"):
        main([*given, f"train.init_checkpoint={released[1]}"])


def test_a_release_is_trained_on_with_other_categories(
    released: tuple[nn.Module, Path], scenes: Any, tmp_path: Path
) -> None:
    scenes.content["categories"].append({"id": 90, "name": "star"})
    scenes.write()
    model, path = released
    run = tmp_path / "run"
    data = [f"dataset.train.json={scenes.json}", f"dataset.train.images={scenes.images}"]
    more = [f"train.init_checkpoint={path}", f"train.output_dir={run}", "train.max_iter=2", "optimizer.lr=1e-9"]
    assert main(["--config-file", str(CONFIG), *SMALL, *data, *more]) == 0
    trained = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert trained["roi_heads.box_predictor.cls_score.weight"].shape[0] == 4
    for name in (
        "roi_heads.box_head.fc1.weight",
        "backbone.pyramid.simfp_2.0.weight",
        "backbone.net.blocks.3.mlp.fc1.weight",
    ):
        torch.testing.assert_close(trained[name], model.state_dict()[name], atol=1e-6, rtol=0)
    log = (run / "log.txt").read_text()
    assert "roi_heads.box_predictor.cls_score.weight" in log and "of other categories, initial value kept" in log
