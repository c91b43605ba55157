"""The encoder against timm's Vision Transformer, and its promises to hosts."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch

from mae_transfer import build_vit
from mae_transfer.errors import ConfigError
from mae_transfer.vit import VisionTransformer


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ("base", "vit_base_patch16_224"),
        pytest.param("large", "vit_large_patch16_224", marks=pytest.mark.slow),
    ],
)
def test_equals_timm(size: str, name: str) -> None:
    torch.manual_seed(0)
    vit = build_vit(size).eval()
    theirs = timm.create_model(name, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(vit.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(images), theirs.forward_features(images), rtol=0, atol=1e-5)
        taps = (0, vit.depth // 2, vit.depth - 1)
        ours = vit.forward_taps(images, taps)
        expected = theirs.forward_intermediates(images, indices=list(taps), norm=False, intermediates_only=True)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (40, 24)])
def test_other_sizes_equal_timm_given_our_positions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    vit = build_vit("tiny", image_size=32, patch_size=8, depth=4).eval()
    grid = (size[0] // 8, size[1] // 8)
    theirs = timm.models.VisionTransformer(
        img_size=size,
        patch_size=8,
        embed_dim=192,
        depth=4,
        num_heads=3,
        num_classes=0,
        global_pool="",
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()
    state = {**vit.state_dict(), "pos_embed": vit.position_rows(grid).detach()}
    theirs.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(images), theirs.forward_features(images), rtol=0, atol=1e-5)


def test_gradients_reach_resized_positions() -> None:
    vit = build_vit("tiny", image_size=32, patch_size=8, depth=2)
    vit.forward_features(torch.randn(1, 3, 48, 40)).square().mean().backward()
    assert vit.pos_embed.grad is not None and vit.pos_embed.grad.abs().sum() > 0


def saved_values(vit: VisionTransformer, images: torch.Tensor) -> int:
    """How many numbers the forward pass keeps for the backward pass."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vit.forward_features(images)
    return sum(kept)


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    gradients, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vit = build_vit(
            "tiny", image_size=32, patch_size=8, depth=3, drop_path=0.5, checkpointing=checkpointing
        ).train()
        torch.manual_seed(1)
        saved.append(saved_values(vit, images))
        torch.manual_seed(1)
        vit.forward_features(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert saved[1] < 0.5 * saved[0]


def test_drop_path_drops_whole_samples_at_the_rate_and_rises_with_depth() -> None:
    torch.manual_seed(0)
    vit = build_vit("tiny", image_size=16, patch_size=8, depth=5, drop_path=0.4)
    assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    out = vit.blocks[4].drop_path.train()(torch.ones(5000, 3, 2))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.amin(1), per_sample.amax(1))
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(vit.blocks[4].drop_path.eval()(out), out)


def test_layer_scale_and_its_keys() -> None:
    vit = build_vit("tiny", image_size=16, patch_size=8, depth=2, layer_scale=0.5)
    assert {"blocks.1.ls1.gamma", "blocks.1.ls2.gamma"} <= set(vit.state_dict())
    plain = build_vit("tiny", image_size=16, patch_size=8, depth=2)
    state = vit.state_dict()
    for i in range(2):  # fold the scale into the last linear layer of each branch: the same function
        for name, gamma in ((f"blocks.{i}.attn.proj", "ls1"), (f"blocks.{i}.mlp.fc2", "ls2")):
            scale = state.pop(f"blocks.{i}.{gamma}.gamma")
            state[f"{name}.weight"] = state[f"{name}.weight"] * scale[:, None]
            state[f"{name}.bias"] = state[f"{name}.bias"] * scale
    plain.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(vit(images), plain(images))


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
def test_every_size_builds(size: str) -> None:
    with torch.device("meta"):
        vit = build_vit(size)
        out = vit.forward_features(torch.empty(1, 3, 224, 224))
    assert out.shape == (1, 1 + (224 // vit.patch_size[0]) ** 2, vit.width)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: build_vit("bass"), "did you mean base"),
        (lambda: build_vit("tiny", image_size=100), "nearest that is: 96x96"),
        (lambda: build_vit("tiny", width=190), "sin-cos positions need a width divisible by 4"),
        (lambda: build_vit("tiny", width=200), "not a multiple of 3 heads"),
        (lambda: build_vit("tiny", window_size=7), "no place for a cls token"),
        (lambda: build_vit("tiny", cls_token=False, window_size=7, global_blocks=(12,)), "do not exist"),
        (lambda: build_vit("tiny", relative_position="bais"), "expected one of"),
        (lambda: build_vit("tiny", relative_position="decomposed"), "cls_token=False"),
        (lambda: build_vit("tiny", image_size=32).forward_taps(torch.randn(1, 3, 30, 32), [0]), "not a whole number"),
        (lambda: build_vit("tiny", image_size=32).forward_taps(torch.randn(1, 3, 32, 32), [12]), "between 0 and 11"),
    ],
)
def test_bad_input_is_named(call, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call()
