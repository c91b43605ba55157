"""Training steps and sliding windows: equal to MMSegmentation's MAE with UperNet from the same weights and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mae_transfer.segmentation.config import derive
from mae_transfer.segmentation.recipe import Facts
from mae_transfer.segmentation.settings import read_settings
from tests.segmentation.conftest import draw_scene, their_name

SIDE, CHANNELS, NUM_CLASSES, LR = 64, 32, 4, 1e-3
DECAY, RATE = 0.05, 0.65  # of the recipe
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
PUBLISHED = "mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"

# Of the constructor and of the meshgrid in MMSegmentation's published config and model.
pytestmark = [
    pytest.mark.filterwarnings("ignore:DeprecationWarning:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
]


def our_config(precision: str = "fp32", **sections: dict[str, Any]) -> Config:
    settings = {
        "dataset": {"crop_size": SIDE},
        "encoder": {"size": "tiny", "drop_path": 0.0},
        "head": {"channels": CHANNELS, "aux_channels": CHANNELS},
        "train": {
            "max_iters": 10,
            "batch_size": 2,
            "lr": LR,
            "weight_decay": DECAY,
            "layer_decay": RATE,
            "weight_decay_groups": "parity",
            "precision": precision,
        },
        **sections,
    }
    facts = Facts(
        size="tiny",
        patch_size=16,
        mean=tuple(value / 255 for value in MEAN),
        std=tuple(value / 255 for value in STD),
        classes=("ground", "red", "green", "blue"),
    )
    return derive(read_settings(settings), facts, "run")


def build(model: Any) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(model)


def our_segmentor(config: Config) -> nn.Module:
    """With tables, layer scales and statistics that show."""
    torch.manual_seed(0)
    model = build(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name or ".ls" in name or "conv_seg.weight" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def published() -> ConfigDict:
    """MMSegmentation's own config for MAE on ADE20K, made small."""
    config = Config.fromfile(Path(mmseg.__file__).parent / ".mim/configs" / PUBLISHED)
    model = config.model
    model.pretrained = None
    model.backbone.update(img_size=(SIDE, SIDE), embed_dims=192, num_heads=3, drop_path_rate=0.0)
    model.neck.embed_dim = 192
    model.decode_head.update(in_channels=[192] * 4, channels=CHANNELS, num_classes=NUM_CLASSES)
    model.auxiliary_head.update(in_channels=192, channels=CHANNELS, num_classes=NUM_CLASSES)
    model.data_preprocessor = {**config.data_preprocessor, "size": (SIDE, SIDE)}
    model.test_cfg.update(crop_size=(SIDE, SIDE), stride=(42, 42))
    config.optim_wrapper.optimizer.lr = LR
    return config


def their_segmentor(published: ConfigDict, ours: nn.Module) -> nn.Module:
    """MMSegmentation's, with the weights of ``ours``; its SyncBN, which no CPU runs, as plain BN."""
    model = revert_sync_batchnorm(build(published.model))
    report = model.load_state_dict({their_name(k): v for k, v in ours.state_dict().items()}, strict=False)
    assert not report.unexpected_keys
    assert all(name.endswith("relative_position_index") for name in report.missing_keys)
    return model


def make_batch(seed: int) -> dict[str, list[Any]]:
    """Two images as MMSegmentation reads them (BGR bytes), some pixels without a label."""
    inputs, samples = [], []
    for index in range(2):
        image, labels = draw_scene(10 * seed + index, (SIDE, SIDE))
        labels[:8, :16] = 255
        inputs.append(torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy()))
        data = PixelData(data=torch.from_numpy(labels.astype(np.int64))[None])
        samples.append(SegDataSample(gt_sem_seg=data, metainfo={"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE)}))
    return {"inputs": inputs, "data_samples": samples}


def train(model: nn.Module, wrapper: Any, batches: list[dict[str, list[Any]]], dtype: torch.dtype) -> list[dict]:
    """The steps of MMEngine's loop; the losses of every one. The heads' dropout is on, drawn from one seed."""
    model.train()
    found = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        with wrapper.optim_context(model):
            data = model.data_preprocessor(batch, True)
            losses = model.loss(data["inputs"].to(dtype), data["data_samples"])
        total, logged = model.parse_losses(losses)
        wrapper.update_params(total)
        found.append({name: float(value.detach()) for name, value in logged.items()})
    return found


@pytest.mark.parametrize(("dtype", "loss_atol"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_equals_the_training_steps_of_mmsegs_mae(published: ConfigDict, dtype: torch.dtype, loss_atol: float) -> None:
    """Same losses; in double precision the same parameters after AdamW with layer decay too. (Adam divides a gradient
    by its own size, so that rounding moves what has next to none as far as everything else.)"""
    config = our_config()
    ours = our_segmentor(config)
    theirs = their_segmentor(published, ours)
    batches = [make_batch(seed) for seed in range(3 if dtype == torch.float64 else 1)]
    results = []
    for model, optim in ((ours, config.optim_wrapper), (theirs, published.optim_wrapper)):
        model.to(dtype)
        with DefaultScope.overwrite_default_scope("mmseg"):
            wrapper = build_optim_wrapper(model, ConfigDict(optim).copy())
        results.append(train(model, wrapper, batches, dtype))
    for found, expected in zip(*results, strict=True):
        assert found.keys() == expected.keys() >= {"decode.loss_ce", "aux.loss_ce"}
        for name, loss in expected.items():
            assert found[name] == pytest.approx(loss, abs=loss_atol), name
    assert results[1][0]["decode.loss_ce"] > 0.1
    if dtype == torch.float64:
        after = theirs.state_dict()
        for name, tensor in ours.state_dict().items():  # running statistics among them
            torch.testing.assert_close(
                tensor, after[their_name(name)], rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("size", [(64, 64), (64, 100), (90, 150)])
@torch.no_grad()
def test_sliding_windows_give_mmsegs_logits(published: ConfigDict, size: tuple[int, int]) -> None:
    ours = our_segmentor(our_config(test={"stride": 42}))
    theirs = their_segmentor(published, ours)
    for model in (ours, theirs):
        model.train(False)  # mmseg's eval() returns nothing for MAE
    images = torch.randn(2, 3, *size)
    logits = [
        model.inference(images, [{"ori_shape": size, "img_shape": size} for _ in images]) for model in (ours, theirs)
    ]
    assert logits[0].shape == (2, NUM_CLASSES, *size)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_bf16_computes_in_bf16_and_trains_alike() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        config = our_config(precision)
        model = our_segmentor(config)
        seen: list[torch.dtype] = []
        for inside in ("backbone.blocks.0.attn.proj", "backbone.blocks.11.mlp.fc1", "decode_head.conv_seg"):
            model.get_submodule(inside).register_forward_hook(lambda *call, seen=seen: seen.append(call[2].dtype))
        with DefaultScope.overwrite_default_scope("mmseg"):
            wrapper = build_optim_wrapper(model, ConfigDict(config.optim_wrapper).copy())
        (step,) = train(model, wrapper, [make_batch(0)], torch.float32)
        assert seen == [torch.float32 if precision == "fp32" else torch.bfloat16] * 3
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        losses[precision] = step["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def gradients(model: nn.Module, batch: dict[str, list[Any]]) -> tuple[dict[str, Tensor], int]:
    """Of every parameter, and the bytes that the encoder keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    data = model.data_preprocessor(batch, True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = model.backbone(data["inputs"])
    losses = model.decode_head.loss(model.neck(maps), data["data_samples"], {})
    losses["loss_ce"].backward()
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return (
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        sum(size for place, size in kept.items() if place not in held),
    )


def test_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    results = []
    for checkpointing in (False, True):
        config = our_config(encoder={"size": "tiny", "drop_path": 0.3, "checkpointing": checkpointing})
        results.append(gradients(our_segmentor(config).train(), make_batch(0)))
    (plain, much), (recomputed, little) = results
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert little < much / 4
