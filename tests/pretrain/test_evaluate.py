"""The loss on unseen images, the trivial predictors beside it, and the work by formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.data.choice import choose_images
from mae_transfer.errors import run_tool
from pretrain import build_mae
from pretrain.baseline import baseline_losses, neighbour_mean
from pretrain.cli import main
from pretrain.planner import forward_flops, training_flops
from tests.pictures import write_pictures

TINY = str(Path(__file__).parents[2] / "configs" / "pretrain" / "tiny.yaml")


def test_neighbour_mean_place_by_place() -> None:
    torch.manual_seed(0)
    h, w = 5, 6
    patches, mask = torch.randn(3, h * w, 7), (torch.rand(3, h * w) < 0.85).float()
    mask[:, 13] = 0
    result = neighbour_mean(patches, mask, (h, w))
    for n in range(3):
        for place in range(h * w):
            if not mask[n, place]:
                continue
            row, column = divmod(place, w)
            for radius in range(1, max(h, w)):
                near = [
                    r * w + c
                    for r in range(max(0, row - radius), min(h, row + radius + 1))
                    for c in range(max(0, column - radius), min(w, column + radius + 1))
                    if not mask[n, r * w + c]
                ]
                if near:
                    break
            torch.testing.assert_close(result[n, place], patches[n, near].mean(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_trivial_losses(normalised: bool) -> None:
    torch.manual_seed(0)
    model = build_mae(size="tiny", image_size=32, patch_size=8, depth=1, decoder_depth=1, norm_pix_loss=normalised)
    images = torch.randn(4, 3, 32, 32) * 0.3 + 1
    output = model(images, torch.rand(4, 16))
    losses = baseline_losses(model.patchify(images), output.mask, model.grid, normalised=normalised)
    # The model's own loss where it predicts zero, and so the same target.
    torch.nn.init.zeros_(model.decoder_pred.weight)
    torch.nn.init.zeros_(model.decoder_pred.bias)
    noise = output.mask  # visible patches first
    assert losses.zero == pytest.approx(model(images, noise).loss.item(), rel=1e-4)
    if normalised:
        assert losses.zero == pytest.approx(191 / 192, rel=1e-4), "unbiased variance: (n - 1) / n"
        # Noise has no neighbours worth asking: the mean of k of them adds 1/k to the loss.
        assert 1.05 < losses.neighbours < 2
    else:
        assert losses.neighbours == losses.neighbours_pixels


def test_a_constant_neighbourhood_is_predicted_exactly() -> None:
    patches = torch.arange(12.0).repeat(2, 16, 1)
    mask = (torch.rand(2, 16) < 0.7).float()
    mask[:, 0] = 0
    assert baseline_losses(patches, mask, (4, 4), normalised=True).neighbours == pytest.approx(0, abs=1e-9)


def test_the_choice_of_images_is_spread_and_fixed() -> None:
    assert choose_images(5, limit=8, seed=0) == [0, 1, 2, 3, 4]
    chosen = choose_images(10_000, limit=500, seed=0)
    assert chosen == choose_images(10_000, limit=500, seed=0) != choose_images(10_000, limit=500, seed=1)
    assert len(set(chosen)) == 500 and abs(sum(chosen) / 500 - 5000) < 500


def test_the_command_prints_both_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_mae(size="tiny", image_size=16, patch_size=4, depth=1, decoder_depth=1)
    info = describe(model, normalised_target=True, decoder_num_heads=4)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), info.to_metadata())
    pictures = write_pictures(tmp_path / "pictures", 5)
    command = [TINY, "--evaluate", str(tmp_path), f"data.val_path={pictures}", "train.precision=fp32"]
    assert run_tool(main, command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "5 images" in lines[0]
    values = [float(line.split()[0]) for line in lines[1:]]
    assert len(values) == 4 and values[0] > 0.9 and values[3] == pytest.approx(47 / 48, abs=0.01)
    assert run_tool(main, command[:3]) == 2
    assert "data.val_path=FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("in_encoder", [False, True])
def test_flops_by_formula_are_torchs_count(in_encoder: bool) -> None:
    model = build_mae(
        size="tiny", image_size=(32, 48), patch_size=8, depth=3, decoder_depth=2, mask_tokens_in_encoder=in_encoder
    )
    images = torch.randn(2, 3, 32, 48)
    with FlopCounterMode(display=False) as counter:
        loss = model(images, mask_ratio=0.5).loss
    assert counter.get_total_flops() == 2 * forward_flops(model, mask_ratio=0.5)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # The images themselves get no gradient, which saves a few per cent of the backward pass.
    total = counter.get_total_flops() + 2 * forward_flops(model, mask_ratio=0.5)
    assert total == pytest.approx(2 * training_flops(model, mask_ratio=0.5), rel=0.03)
