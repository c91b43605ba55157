"""Training steps: equal to Detectron2's ViTDet from the same weights and batches, and to the sum of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import get_vit_lr_decay_rate
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.solver import LRMultiplier
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from mae_transfer.detection.hooks import FollowSchedule
from mae_transfer.detection.model import mask_rcnn
from mae_transfer.detection.optimizer import adamw, schedule
from mae_transfer.detection.trainer import Trainer
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.randomness import seed_step
from mae_transfer.errors import RunFailed
from tests.detection.conftest import draw_scene

SIDE, CHANNELS, WIDTH = 96, 16, 32
LR, DECAY, RATE = 1e-3, 0.1, 0.7
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
Batch = list[dict[str, Any]]


def make_batch(seed: int, num_images: int = 2) -> Batch:
    rng = np.random.default_rng(seed)
    batch = []
    for _ in range(num_images):
        image, annotations = draw_scene(rng, SIDE, 4)
        boxes = np.array([a["bbox"] for a in annotations])
        boxes[:, 2:] += boxes[:, :2]
        rows, columns = np.mgrid[:SIDE, :SIDE]
        masks = [(columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1) for x0, y0, x1, y1 in boxes]
        instances = Instances((SIDE, SIDE))
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.tensor([0, 1, 0, 1])
        instances.gt_masks = BitMasks(torch.as_tensor(np.stack(masks)))
        batch.append({"image": torch.as_tensor(image.transpose(2, 0, 1).copy()), "instances": instances})
    return batch


def our_detector(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_classes": 2,
        "image_size": SIDE,
        "square_size": SIDE,
        "pixel_mean": MEAN,
        "pixel_std": STD,
        "size": "tiny",
        "patch_size": 16,
        "channels": CHANNELS,
        "box_fc_width": WIDTH,
        "window_size": 3,
        "drop_path": 0.0,
        "rois_per_image": 32,
    }
    return mask_rcnn(**{**arguments, **overrides})


def their_detector() -> nn.Module:
    """Detectron2's own ViTDet config, made small."""
    cfg = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    vit = cfg.backbone.net
    vit.img_size, vit.patch_size, vit.embed_dim, vit.num_heads = SIDE, 16, 192, 3
    vit.pretrain_img_size, vit.window_size, vit.drop_path_rate = SIDE, 3, 0.0
    cfg.backbone.square_pad, cfg.backbone.out_channels = SIDE, CHANNELS
    cfg.proposal_generator.head.in_channels = CHANNELS
    roi = cfg.roi_heads
    roi.num_classes, roi.batch_size_per_image = 2, 32
    roi.box_head.input_shape = ShapeSpec(channels=CHANNELS, height=7, width=7)
    roi.box_head.conv_dims, roi.box_head.fc_dims = [CHANNELS] * 4, [WIDTH]
    roi.box_predictor.input_shape = ShapeSpec(channels=WIDTH)
    roi.mask_head.input_shape = ShapeSpec(channels=CHANNELS, height=14, width=14)
    roi.mask_head.conv_dims = [CHANNELS] * 5
    return instantiate(cfg)


def their_name(name: str) -> str:
    """Ours has the pyramid as a module of its own."""
    return name.replace("backbone.pyramid.", "backbone.")


def train(model: nn.Module, batches: Sequence[Any], optimizer: torch.optim.Optimizer, **settings: Any) -> Trainer:
    """Our steps on ``batches``; a batch is of ``accumulate`` micro-batches."""
    precision = settings.pop("precision", Precision("fp32", torch.device("cpu")))
    trainer = Trainer(model, batches, optimizer, precision=precision, seed=0, **settings)
    trainer.register_hooks([FollowSchedule(optimizer, schedule(max_iter=100, warmup_iters=3), 100)])
    trainer.train(0, len(batches) // trainer.accumulate)
    return trainer


def test_equals_the_training_steps_of_detectron2s_vitdet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same losses, and the same parameters after AdamW with layer decay. In double precision: Adam divides a gradient
    by its own size, so that rounding would move what has next to none as far as everything else."""
    # torchvision's suppression takes Detectron2's boxes, always float32, with scores of the same type only.
    suppress = proposal_utils.batched_nms
    monkeypatch.setattr(
        proposal_utils, "batched_nms", lambda boxes, scores, *rest: suppress(boxes, scores.float(), *rest)
    )
    ours, theirs = our_detector().double(), their_detector().double()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "rel_pos" in name:  # begins at zero, where mistakes in it would not show
                parameter.normal_(std=0.05)
    incompatible = theirs.load_state_dict({their_name(k): v for k, v in ours.state_dict().items()}, strict=False)
    assert not incompatible.missing_keys
    assert not incompatible.unexpected_keys
    batches = [make_batch(seed) for seed in range(3)]

    # As in projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py.
    cfg = model_zoo.get_config("common/optim.py").AdamW
    cfg.lr, cfg.weight_decay = LR, DECAY
    cfg.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=RATE)
    cfg.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
    cfg.params.model = theirs
    optimizer = instantiate(cfg)
    factor = LRMultiplier(optimizer, schedule(max_iter=100, warmup_iters=3), 100)
    expected = []
    theirs.train()
    for step, batch in enumerate(batches):
        seed_step(seed=0, step=step, part=0, device=torch.device("cpu"))
        with EventStorage():
            losses = theirs(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        factor.step()
        expected.append({name: loss.item() for name, loss in losses.items()})

    trainer = train(ours, batches, adamw(ours, lr=LR, weight_decay=DECAY, layer_decay=RATE, decay_rule="parity"))
    for step, losses in enumerate(expected):
        for name, loss in losses.items():
            assert trainer.storage.history(name).values()[step][0] == pytest.approx(loss, abs=1e-6), name
        assert losses["loss_mask"] > 0
    after = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, after[their_name(name)], rtol=0, atol=1e-12, msg=name)


class Fit(nn.Module):
    """A model small enough to be computed by hand: two losses of a vector, each the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        x = torch.stack(batch)
        return {"loss_a": (x @ self.weight - 1).square().mean(), "loss_b": (x * self.weight).abs().mean()}


def fit_batches(count: int, size: int = 3) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [list(torch.randn(size, 5, generator=generator)) for _ in range(count)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def whole_steps(batches: Sequence[list[torch.Tensor]], clip: float | None = None) -> tuple[list[torch.Tensor], float]:
    """The weights after each plain step, and the last gradient's norm."""
    model, weights, norm = Fit(), [], 0.0
    optimizer = sgd(model)
    factor = schedule(max_iter=100, warmup_iters=3)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.1 * factor(step / 100)
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        assert model.weight.grad is not None
        norm = model.weight.grad.norm().item()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        weights.append(model.weight.detach().clone())
    return weights, norm


@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(clip: float | None) -> None:
    parts = fit_batches(6)
    expected, norm = whole_steps([first + second for first, second in zip(parts[::2], parts[1::2])], clip)
    model = Fit()
    trainer = train(model, parts, sgd(model), accumulate=2, clip_norm=clip)
    torch.testing.assert_close(model.weight.data, expected[-1])
    assert trainer.storage.history("grad_norm").latest() == pytest.approx(norm, rel=1e-5)  # before clipping
    assert trainer.storage.latest()["total_loss"][1] == 2


def test_the_average_follows_the_weights() -> None:
    batches = fit_batches(4)
    weights, _ = whole_steps(batches)
    expected = Fit().weight.detach()
    for step, weight in enumerate(weights, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    model = Fit()
    trainer = train(model, batches, sgd(model), average=WeightAverage(model, 0.5))
    with trainer.averaged():
        torch.testing.assert_close(model.weight.data, expected)
    torch.testing.assert_close(model.weight.data, weights[-1])


@pytest.mark.parametrize(("poison", "what"), [("loss", "the loss"), ("gradient", "the gradient")])
def test_what_is_not_finite_ends_the_run_before_it_reaches_the_weights(poison: str, what: str) -> None:
    model, batches = Fit(), fit_batches(3)
    if poison == "loss":
        batches[1][0][2] = torch.nan
    else:
        backwards = iter([0.0, torch.inf])
        model.weight.register_hook(lambda grad: grad + next(backwards))
    with pytest.raises(RunFailed, match=f"{what} is no longer finite at iteration 1; resume"):
        train(model, batches, sgd(model))
    torch.testing.assert_close(model.weight.data, whole_steps(batches[:1])[0][-1])


class Scaled(Precision):
    """fp16's gradient scaling without fp16, which no CPU computes in."""

    def __init__(self) -> None:
        super().__init__("fp32", torch.device("cpu"))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_the_gradient_scale_is_taken_out_again_and_an_overflow_skips_the_step() -> None:
    batches = fit_batches(3)
    model = Fit()
    trainer = train(model, batches, sgd(model), precision=Scaled(), clip_norm=0.5)
    torch.testing.assert_close(model.weight.data, whole_steps(batches, 0.5)[0][-1])

    overflowing = Fit()
    backwards = iter([0.0, 0.0, torch.inf])
    overflowing.weight.register_hook(lambda grad: grad + next(backwards))
    trainer = train(overflowing, batches, sgd(overflowing), precision=Scaled(), clip_norm=0.5)
    torch.testing.assert_close(overflowing.weight.data, whole_steps(batches[:2], 0.5)[0][-1])
    assert trainer.state_dict()["scaler"]["scale"] == 512


def test_bf16_computes_in_bf16_on_the_cpu_and_trains_alike() -> None:
    losses = {}
    for name in ("fp32", "bf16"):
        model = our_detector(norm="BN", rois_per_image=16, patch_size=32)
        seen: list[torch.dtype] = []
        model.get_submodule("backbone.net.blocks.0.mlp.fc1").register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2].dtype)
        )
        precision = Precision(name, torch.device("cpu"))
        trainer = train(model, [make_batch(0), make_batch(1)], adamw(model, lr=LR), precision=precision)
        assert set(seen) == {torch.float32 if name == "fp32" else torch.bfloat16}
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        losses[name] = trainer.storage.history("total_loss").values()[0][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
