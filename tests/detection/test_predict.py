"""Prediction with a run that is there: one image and many, ids of a json, and what cannot be predicted on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image
from pycocotools.coco import COCO

from mae_transfer.checkpoint import image_statistics, load_backbone
from mae_transfer.detection import Predictor
from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.config import load_config, resolve, save_config
from mae_transfer.errors import ConfigError, DataError, run_tool
from mae_transfer.predict import main
from mae_transfer.vit import build_vit

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"
SMALL = [
    "dataset.image_size=64",
    "model.patch_size=16",
    "model.channels=32",
    "model.box_fc_width=32",
    "model.mask_convs=1",
    "model.window_size=3",
    "model.anchor_sizes=[8,16,32,64,128]",
    "model.score_threshold=0.0",
    "model.detections_per_image=20",
]


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=3, side=64)


@pytest.fixture
def make_run(scenes: Any, tmp_path: Path) -> Callable[..., Path]:
    """``make_run(config, *overrides)`` -> a folder as training leaves it, with weights that all matter."""

    def make(config: str = "tiny", *overrides: str) -> Path:
        folder = tmp_path / "run"
        cfg = resolve(load_config(CONFIGS / f"{config}.py", [*scenes.overrides, *SMALL, *overrides]))
        folder.mkdir()
        save_config(cfg, folder / "config.yaml")
        torch.manual_seed(0)
        model = instantiate(cfg.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        StrictCheckpointer(model, str(folder)).save("model_final")
        return folder

    return make


def same(a: Any, b: Any) -> None:
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-4)
    assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize(
    ("config", "resize"),
    [
        ("tiny", "native"),
        ("tiny", "jitter"),
        ("tiny_cascade", "native"),
        pytest.param("tiny_fpn", "native", marks=pytest.mark.slow),
    ],
)
def test_a_batch_finds_what_single_images_do(config: str, resize: str, make_run: Callable[..., Path]) -> None:
    predictor = Predictor(make_run(config, f"dataset.resize={resize}"), device="cpu")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in ((64, 64), (40, 70), (64, 50))]
    for image, instances in zip(images, predictor.batch(images)):
        assert instances.image_size == image.shape[:2] == instances.pred_masks.shape[1:]
        same(instances, predictor(image))
    assert predictor.names == ["box", "disc"]


def test_files_checkpoints_and_scores(make_run: Callable[..., Path], scenes: Any) -> None:
    folder, file = make_run(), scenes.images / "000.png"
    everything = Predictor(folder, device="cpu")(np.asarray(Image.open(file)))
    by_checkpoint = Predictor(str(folder / "model_final.pth"), device="cpu")
    same(by_checkpoint(str(file)), everything)
    threshold = float(everything.scores.median())
    kept = Predictor(folder, device="cpu", min_score=threshold)(file)
    assert len(kept) == int((everything.scores >= threshold).sum()) < len(everything)


def test_what_starts_from_a_run_sees_images_as_the_run_did(make_run: Callable[..., Path], scenes: Any) -> None:
    file = make_run("tiny", "dataset.mean=[0.1,0.2,0.3]", "dataset.std=[0.4,0.5,0.6]") / "model_final.pth"
    assert image_statistics(file) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    cfg = resolve(load_config(CONFIGS / "tiny.py", [*scenes.overrides, f"train.init_checkpoint={file}"]))
    assert list(cfg.model.pixel_mean) == pytest.approx([25.5, 51, 76.5])
    vit = build_vit("tiny", patch_size=16, image_size=64, cls_token=False, final_norm=False)
    assert not load_backbone(vit, file).missing


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_arrays_of_another_kind_are_refused(image: np.ndarray, make_run: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"expected uint8 \(height, width, 3\)"):
        Predictor(make_run(), device="cpu")(image)


def test_what_cannot_be_meant(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    with pytest.raises(ConfigError, match="min_score 2"):
        Predictor(folder, min_score=2)
    with pytest.raises(ConfigError, match="device=tpu9"):
        Predictor(folder, device="tpu9")


def test_results_carry_the_ids_of_a_json(make_run: Callable[..., Path], scenes: Any, tmp_path: Path) -> None:
    folder, out = make_run(), tmp_path / "out"
    more = ["--json", str(scenes.json), "--batch-size", "2", "--device", "cpu", "--min-score", "0.99"]
    assert main([str(folder), str(scenes.images), "--out", str(out), *more]) == 0
    truth = COCO(str(scenes.json))
    found = truth.loadRes(str(out / "detections.json"))  # refuses ids that the json does not have
    assert {a["image_id"] for a in found.anns.values()} == {0, 10, 20}
    assert {a["category_id"] for a in found.anns.values()} <= {3, 7}
    listing = json.loads((out / "images.json").read_text())
    assert [(i["id"], Path(i["file_name"]).name) for i in listing["images"]] == [
        (image["id"], image["file_name"]) for image in scenes.content["images"]
    ]
    with Image.open(out / "0000_000.png") as overlay:
        assert overlay.size == (8 * 64, 8 * 64)


def tool(run: Path, images: Path, *more: str) -> int:
    return run_tool(main, [str(run), str(images), "--out", str(images.parent / "out"), "--device", "cpu", *more])


def test_a_json_of_other_images_or_categories(make_run: Callable[..., Path], scenes: Any, capsys: Any) -> None:
    folder = make_run()
    extra = scenes.images / "stranger.png"
    Image.new("RGB", (8, 8)).save(extra)
    assert tool(folder, scenes.images, "--json", str(scenes.json)) == 2
    assert "does not list 1 of the 4 images, such as" in capsys.readouterr().err
    extra.unlink()
    scenes.content["categories"][0]["name"] = "wheel"
    scenes.write()
    assert tool(folder, scenes.images, "--json", str(scenes.json)) == 2
    assert "category 7 is 'wheel', in the run it is 'disc'" in capsys.readouterr().err
    for content in ("not json", "[]", '{"images": [{"id": 1}]}'):
        scenes.json.write_text(content)
        assert tool(folder, scenes.images, "--json", str(scenes.json)) == 2
        assert "expected a COCO json" in capsys.readouterr().err


def test_an_unreadable_image_does_not_cost_the_others(make_run: Callable[..., Path], scenes: Any, capsys: Any) -> None:
    (scenes.images / "001.png").write_bytes(b"not an image")
    assert tool(make_run(), scenes.images, "--batch-size", "3") == 2
    error = capsys.readouterr().err
    assert "1 of 3 images could not be read" in error and "001.png" in error
    out = scenes.images.parent / "out"
    assert sorted(path.name for path in out.glob("*.png")) == ["0000_000.png", "0002_002.png"]
    assert {d["image_id"] for d in json.loads((out / "detections.json").read_text())} == {0, 2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--min-score", "1.5"], "--min-score 1.5"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--device", "abacus"], "device=abacus"),
    ],
)
def test_settings_that_are_none(
    more: list[str], message: str, make_run: Callable[..., Path], scenes: Any, capsys: Any
) -> None:
    assert tool(make_run(), scenes.images, *more) == 2
    assert message in capsys.readouterr().err


def test_settings_of_detection_are_not_ignored_elsewhere(scenes: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "segmentation").mkdir()
    (tmp_path / "segmentation" / "config.py").write_text("")
    assert tool(tmp_path / "segmentation", scenes.images, "--min-score", "0.5") == 2
    assert "--min-score is for detection runs" in capsys.readouterr().err
