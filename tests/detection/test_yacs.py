"""Classic configs: the base files build the same detectors, and DefaultTrainer and DefaultPredictor work with them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from mae_transfer.checkpoint import describe, encoder_state, write_safetensors
from mae_transfer.detection import add_mae_config, build_optimizer
from mae_transfer.detection.config import load_config, resolve
from mae_transfer.detection.loader import read_rgb
from mae_transfer.errors import ConfigError
from mae_transfer.vit import build_vit

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"


def classic(name: str = "Base-MAE-ViT", *overrides: Any) -> CfgNode:
    cfg = get_cfg()
    add_mae_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "yacs" / f"{name}.yaml"))
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.mark.parametrize(
    ("classic_name", "lazy_name"),
    [("Base-MAE-ViT", "mask_rcnn_b_sfp_100ep"), ("Base-MAE-ViT-FPN", "mask_rcnn_b_fpn_100ep")],
)
def test_the_base_files_build_what_the_lazy_configs_do(
    classic_name: str, lazy_name: str, make_scenes: Callable[..., Any]
) -> None:
    lazy = resolve(load_config(CONFIGS / f"{lazy_name}.py", make_scenes(num_images=1, side=48).overrides))
    cfg = classic(classic_name, "MODEL.DEVICE", "meta", "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    with torch.device("meta"):
        expected, got = instantiate(lazy.model), build_model(cfg)
    assert {name: t.shape for name, t in got.state_dict().items()} == {
        name: t.shape for name, t in expected.state_dict().items()
    }
    assert (got.input_format, cfg.MODEL.PIXEL_MEAN) == ("RGB", pytest.approx([123.675, 116.28, 103.53]))
    ours, theirs = got.roi_heads.box_predictor, expected.roi_heads.box_predictor
    for name in ("test_score_thresh", "test_nms_thresh", "test_topk_per_image", "smooth_l1_beta"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("batch_size_per_image", "pre_nms_topk", "post_nms_topk", "nms_thresh", "positive_fraction"):
        ours_rpn, theirs_rpn = got.proposal_generator, expected.proposal_generator
        assert getattr(ours_rpn, name) == getattr(theirs_rpn, name), name
    groups = [instantiate({**lazy.optimizer, "model": expected}).param_groups, build_optimizer(cfg, got).param_groups]
    lists = [[(g["lr"], g["weight_decay"], len(g["params"])) for g in of] for of in groups]
    assert lists[0] == lists[1]


@contextmanager
def registered(name: str, scenes: Any) -> Iterator[None]:
    register_coco_instances(name, {}, str(scenes.json), str(scenes.images))
    try:
        yield
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# Detectron2 unpickles its records from a read-only buffer.
@pytest.mark.filterwarnings("ignore:The given (NumPy array|buffer) is not writable")
def test_default_trainer_and_predictor(
    make_scenes: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="detectron2")  # else DefaultTrainer sets up handlers that stay
    blocks = re.findall(r"```python\n(.*?)```", (CONFIGS / "README.md").read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "DefaultTrainer" in block]
    names: dict[str, Any] = {}
    exec(script.replace("configs/detection/", f"{CONFIGS}/"), names)
    vit = build_vit("tiny", image_size=32)
    encoder = tmp_path / "encoder.safetensors"
    write_safetensors(encoder, encoder_state(vit.state_dict()), describe(vit).to_metadata())
    scenes = make_scenes(num_images=4, side=64)
    cfg = names["cfg"]
    mae = {"SIZE": "tiny", "IMAGE_SIZE": 64, "POSITION_SIZE": 32, "OUT_CHANNELS": 16, "INIT_CHECKPOINT": str(encoder)}
    for key, value in mae.items():
        cfg.MODEL.MAE[key] = value
    cfg.merge_from_list(
        ["DATASETS.TRAIN", ("classic_scenes",), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / "run")]
        + ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", False, "DATALOADER.NUM_WORKERS", 0]
        + ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 1]
        + [
            "INPUT.MASK_FORMAT",
            "bitmask",
            "SOLVER.BASE_LR",
            1e-9,
            "INPUT.MIN_SIZE_TRAIN",
            (64,),
            "INPUT.MIN_SIZE_TEST",
            64,
        ]
        + ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
        + ["MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    )
    (tmp_path / "run").mkdir()
    with registered("classic_scenes", scenes):
        trainer = names["Trainer"](cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 14  # layer decay over 12 blocks
    trained = torch.load(tmp_path / "run" / "model_final.pth", weights_only=False)["model"]
    torch.testing.assert_close(
        trained["backbone.net.blocks.3.mlp.fc1.weight"], vit.blocks[3].mlp.fc1.weight, atol=1e-6, rtol=0
    )
    cfg.MODEL.WEIGHTS = str(tmp_path / "run" / "model_final.pth")
    image = read_rgb({"file_name": str(scenes.images / "000.png")})
    predictor = DefaultPredictor(cfg)
    bgr = image[:, :, ::-1].copy()  # DefaultPredictor takes BGR and turns it to the config's RGB
    instances = predictor(bgr)["instances"]
    assert len(instances) > 0 and instances.image_size == (64, 64)
    with torch.no_grad():
        direct = predictor.model([{"image": torch.as_tensor(image.transpose(2, 0, 1).copy())}])[0]["instances"]
    torch.testing.assert_close(instances.scores, direct.scores, atol=1e-5, rtol=0)


def test_a_config_without_the_section_says_what_to_call() -> None:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_mae_vit_sfp_backbone"
    with pytest.raises(ConfigError, match="add_mae_config"):
        build_model(cfg)
