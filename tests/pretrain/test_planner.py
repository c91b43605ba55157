"""Work against torch's counter, memory against what autograd keeps, hours against the published wall clocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mae_transfer import recompute
from mae_transfer.engine.config import read_config
from mae_transfer.errors import ConfigError, run_tool
from pretrain import MaskedAutoencoder, build_mae
from pretrain.cli import main
from pretrain.config import PretrainConfig
from pretrain.planner import (
    DEVICES,
    IMAGENET_IMAGES,
    activation_bytes,
    forward_flops,
    forward_work,
    hours,
    memory,
    parse_plan,
    plan,
    training_flops,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"


def meta(size: str, **more: Any) -> MaskedAutoencoder:
    with torch.device("meta"):
        return build_mae(size=size, **more)


@pytest.mark.parametrize("fuse", [True, False])
def test_flops_of_a_cross_decoder_are_torchs_count(fuse: bool) -> None:
    model = build_mae(
        size="tiny", image_size=(32, 48), patch_size=8, depth=3, decoder="cross", cross_fuse_features=fuse
    )
    images = torch.randn(2, 3, 32, 48)
    with FlopCounterMode(display=False) as counter:
        loss = model(images, mask_ratio=0.5).loss
    assert counter.get_total_flops() == 2 * forward_flops(model, mask_ratio=0.5)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    total = counter.get_total_flops() + 2 * forward_flops(model, mask_ratio=0.5)
    assert total == pytest.approx(2 * training_flops(model, mask_ratio=0.5), rel=0.03)


def test_the_papers_claims_of_the_decoder() -> None:
    """Section 3: the default decoder has less than a tenth of the computation per token of ViT-L's encoder."""
    large = forward_work(meta("large"))
    assert large.decoder_per_token < 0.1
    assert (large.encoder_tokens, large.decoder_tokens) == (50, 197)
    # Table 1c: mask tokens in the encoder take 3.3 times the operations.
    everywhere = forward_work(meta("large", mask_tokens_in_encoder=True))
    assert everywhere.total / large.total == pytest.approx(3.3, abs=0.1)
    # CrossMAE: 2.5 to 3.7 times less decoding, at the same depth and with a quarter or all of the patches predicted.
    cross = forward_work(meta("base", decoder="cross", cross_fuse_features=False))
    assert forward_work(meta("base")).decoder / cross.decoder > 3


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes norms, GELU and softmax again rather than keep them; a plan is for GPUs, which do not."""
    monkeypatch.setattr(recompute, "ON_CPU", False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "model",
    [
        {"size": "tiny"},
        {"size": "small", "depth": 6},
        {"size": "base", "depth": 2, "decoder_depth": 2},
        {"size": "tiny", "decoder": "cross"},
        {"size": "tiny", "decoder": "cross", "cross_fuse_features": False},
        {"size": "tiny", "mask_tokens_in_encoder": True},
    ],
)
def test_memory_by_formula_is_what_autograd_keeps(model: dict[str, Any], precision: str) -> None:
    """Within 10 %: storages kept for the backward pass, each once, parameters aside."""
    mae = build_mae(**model, image_size=96)
    images = torch.randn(4, 3, 96, 96)
    expected = memory(mae, micro_batch=4, precision=precision)
    # The formula counts the images and their patches too, which the step holds and autograd does not.
    formula = expected.activations + expected.copies - 2 * 4 * images.numel()
    assert kept_bytes(mae, images, precision) == pytest.approx(formula, rel=0.1)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_memory_with_recomputation_is_what_autograd_keeps() -> None:
    images = torch.randn(4, 3, 96, 96)
    mae = build_mae(size="small", image_size=96, checkpointing=True)
    kept = kept_bytes(mae, images, "fp32")
    recomputed = memory(mae, micro_batch=4, precision="fp32", recompute=True).activations - 2 * 4 * images.numel()
    plain = 4 * activation_bytes(mae, precision="fp32") - 2 * 4 * images.numel()
    assert kept < recomputed < plain / 4  # one block is computed again on top of what is kept
    assert kept_bytes(build_mae(size="small", image_size=96), images, "fp32") == pytest.approx(plain, rel=0.1)


def kept_bytes(model: MaskedAutoencoder, images: Tensor, precision: str) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in parameters:
            kept.setdefault(storage, tensor)
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = model(images)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.loss.requires_grad
    return total


def test_states_of_ddp_and_fsdp2() -> None:
    model = meta("large")
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = memory(model, micro_batch=64)
    assert (whole.parameters, whole.gradients, whole.moments) == (4 * parameters, 4 * trained, 8 * trained)
    alone = memory(model, micro_batch=64, num_processes=1000, sharded=True)
    assert alone.moments < whole.moments / 900 and alone.parameters < whole.parameters / 8
    assert alone.activations == whole.activations
    less = memory(model, micro_batch=64, recompute=True)
    assert less.activations < whole.activations / 2 and less.parameters == whole.parameters


# The paper's wall clocks: 800 epochs on 128 TPU v3 cores (Table 2 and the text beside it).
WALL_CLOCKS = {
    ("large", True, 8): 42.4,
    ("large", False, 8): 15.4,
    ("large", False, 1): 11.6,
    ("huge", True, 8): 119.6,
    ("huge", False, 8): 34.5,
    ("huge", False, 1): 29.3,
}


@pytest.mark.parametrize("row", WALL_CLOCKS)
def test_hours_are_the_published_wall_clocks(row: tuple[str, bool, int]) -> None:
    """All six within 12 % by one MFU for all of them, the one that the table of devices states."""
    size, mask_tokens_in_encoder, depth = row
    model = meta(size, mask_tokens_in_encoder=mask_tokens_in_encoder, decoder_depth=depth)
    planned = hours(training_flops(model), num_images=800 * IMAGENET_IMAGES, device=DEVICES["tpu-v3"], count=128)
    assert planned == pytest.approx(WALL_CLOCKS[row], rel=0.12)


def test_the_plan_of_a_config() -> None:
    config = read_config(PretrainConfig, CONFIGS / "large_800ep.yaml")
    text = plan(config, **parse_plan(["gpus=64", "kind=h100"]))
    row = next(line for line in text.splitlines() if line.startswith("this (large)")).split()
    assert row[2:4] == ["329.54", "123.7"]
    seconds = 123.7e9 * 800 * IMAGENET_IMAGES / (64 * 989e12 * 0.4)
    assert float(row[4]) == pytest.approx(seconds / 3600, abs=0.06)
    assert "ViT-B" in text and "ViT-H" in text and "assumed" in text and "MFU 40%" in text and "ImageNet-1K" in text
    twice = plan(config, **parse_plan(["gpus=64", "kind=h100", "mfu=0.2", "images=1281167"]))
    assert float(next(line for line in twice.splitlines() if line.startswith("this")).split()[4]) == pytest.approx(
        2 * float(row[4]), abs=0.1
    )


def test_the_command_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(CONFIGS / "base_800ep.yaml"), "--plan", "gpus=32", "kind=a100", "model.decoder=cross"]
    assert run_tool(main, command) == 0
    crossed = capsys.readouterr().out
    assert run_tool(main, command[:-1]) == 0
    plain = capsys.readouterr().out
    assert crossed.startswith("plan: 32 x a100, 800 epochs") and crossed != plain
    assert run_tool(main, [*command[:2], "gpus=32"]) == 2
    assert "lacks kind" in capsys.readouterr().err


def test_what_does_not_fit_is_marked_and_what_cannot_be_planned_is_said() -> None:
    config = read_config(PretrainConfig, CONFIGS / "huge_800ep.yaml", ["train.accumulate=1"])
    text = plan(config, gpus=8, kind="v100")
    row = next(line for line in text.splitlines() if line.startswith("this (huge)"))
    assert "!" in row
    tiny = plan(read_config(PretrainConfig, CONFIGS / "tiny.yaml"), gpus=1, kind="rtx4090")
    assert "no row for huge" in tiny and "70" in tiny


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["gpus=64"], "lacks kind"),
        (["gpus=x", "kind=h100"], "'x' is no number"),
        (["gpu=64", "kind=h100"], "expected gpus=N kind=K"),
        (["gpus=64", "kind=h1000"], "did you mean h100"),
        (["gpus=60", "kind=h100"], "nearest that does: 4080 or 4140"),
        (["gpus=64", "kind=h100", "mfu=2"], "mfu <= 1"),
    ],
)
def test_bad_plans_are_named(given: list[str], says: str) -> None:
    config = read_config(PretrainConfig, CONFIGS / "large_800ep.yaml", ["train.accumulate=1"])
    with pytest.raises(ConfigError, match=says):
        plan(config, **parse_plan(given))
