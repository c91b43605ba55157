"""What the encoder can be besides MAE's: registers, rotary positions, a gated MLP, no positions of its own.

That the features are those of the models which have these stands in ``tests/checkpoint/test_families_*``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_transfer import build_vit, recompute
from mae_transfer.errors import ConfigError
from mae_transfer.layer_decay import parameter_groups
from mae_transfer.position import rotary_2d
from mae_transfer.vit import Block, VisionTransformer

SMALL: dict[str, Any] = {"size": "tiny", "image_size": 32, "patch_size": 8, "depth": 2}
DINOV3: dict[str, Any] = {"num_registers": 4, "absolute_positions": False, "rope_base": 100.0, "layer_scale": 1e-5}


def build(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return build_vit(**SMALL, **options)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({}, 1), ({"cls_token": False}, 0), ({"num_registers": 4}, 5), (DINOV3 | {"ffn": "swiglu"}, 5)],
)
def test_tokens_before_the_patches(options: dict[str, Any], prefix: int) -> None:
    vit = build(**options).eval()
    assert vit.num_prefix_tokens == prefix
    with torch.no_grad():
        tokens = vit.forward_features(torch.randn(2, 3, 32, 48))
        (tap,) = vit.forward_taps(torch.randn(2, 3, 32, 48), [1])
        patches = vit.tokens_to_map(tokens, (4, 6)).flatten(2).transpose(1, 2)
    assert tokens.shape == (2, prefix + 24, 192) and tap.shape == (2, 192, 4, 6)
    assert torch.equal(patches, tokens[:, prefix:])


def test_no_option_adds_a_key_to_the_plain_encoder() -> None:
    plain = set(build().state_dict())
    assert set(build(num_registers=4).state_dict()) - plain == {"register_tokens"}
    assert plain - set(build(absolute_positions=False, rope_base=100.0).state_dict()) == {"pos_embed"}
    assert set(build(ffn="swiglu").state_dict()) == plain


def test_blocks_in_two_runs_are_one_run() -> None:
    vit = build(**DINOV3).eval()
    with torch.no_grad():
        x, grid = vit.embed(torch.randn(1, 3, 32, 32))
        halves = vit.run_blocks(vit.run_blocks(x, grid, stop=1), grid, start=1)
        assert torch.equal(halves, vit.run_blocks(x, grid))
        assert torch.equal(x, vit.run_blocks(x, grid, start=1, stop=1))


def test_rotary_scores_depend_on_offsets_alone_and_keep_lengths() -> None:
    """In float64, by complex numbers: channel pairs (i, i + d/2) are turned by an angle linear in row and column."""
    h, w, d = 3, 5, 16
    cos, sin = rotary_2d((h, w), d, base=100.0)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(d // 2, 2, generator=generator, dtype=torch.float64)
    query = torch.complex(vector[:, 0], vector[:, 1])
    frequency = 100.0 ** (-torch.arange(d // 4, dtype=torch.float64) / (d / 4))
    for index in (0, 7, 14):
        place = torch.tensor([(2 * (index // w) + 1) / h - 1, (2 * (index % w) + 1) / w - 1], dtype=torch.float64)
        turned = query * torch.exp(2j * torch.pi * torch.cat([place[0] * frequency, place[1] * frequency]))
        x = torch.cat([vector[:, 0], vector[:, 1]])
        swapped = torch.cat([-vector[:, 1], vector[:, 0]])
        found = x * cos[index].double() + swapped * sin[index].double()
        torch.testing.assert_close(found, torch.cat([turned.real, turned.imag]), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.norm(), x.norm(), rtol=1e-5, atol=0)


def gradients(vit: VisionTransformer, images: Tensor) -> list[Tensor]:
    vit.zero_grad()
    vit.forward_features(images).square().mean().backward()
    return [parameter.grad.clone() for parameter in vit.parameters() if parameter.grad is not None]


def test_recomputation_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a width where norms, GELU and softmax are computed again on CPUs, and with whole blocks computed again."""
    torch.manual_seed(0)
    options = DINOV3 | {"layer_scale": 0.5, "ffn": "swiglu", "mlp_ratio": 2.0}
    vit = build_vit("small", image_size=32, patch_size=8, depth=2, **options)
    images = torch.randn(2, 3, 32, 32)
    found = gradients(vit, images)
    assert len(found) == len(list(vit.parameters()))
    for block in vit.blocks:
        assert isinstance(block, Block)
        block.checkpointing = True
    again = gradients(vit, images)
    monkeypatch.setattr(recompute, "ON_CPU", False)
    written_out = gradients(vit, images)
    for mine, other, plain in zip(found, again, written_out, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(plain, mine, rtol=1e-3, atol=1e-6)


def test_copied_and_exported_after_use() -> None:
    vit = build(**DINOV3).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = vit(images)
        assert torch.equal(copy.deepcopy(vit)(images), expected)
        exported = torch.export.export(vit, (images,)).module()
        torch.testing.assert_close(exported(images), expected, rtol=0, atol=1e-5)


def test_registers_learn_as_the_embeddings_do_and_are_not_decayed() -> None:
    groups = parameter_groups(build(**DINOV3), depth=2, rate=0.5, lr=1.0, weight_decay=0.05)
    of = {name: group for group in groups for name in group["names"]}
    assert (of["register_tokens"]["layer_id"], of["register_tokens"]["weight_decay"]) == (0, 0.0)
    assert (of["blocks.1.ls1.gamma"]["layer_id"], of["blocks.1.ls1.gamma"]["weight_decay"]) == (2, 0.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ffn": "relu"}, "ffn is 'relu'; expected one of mlp, swiglu"),
        ({"num_registers": 4, "cls_token": False}, "register tokens go with a cls token"),
        ({"num_registers": 4, "relative_position": "bias"}, "register tokens go with"),
        ({"rope_base": 100.0, "relative_position": "bias"}, "exclude one another"),
        ({"rope_base": 100.0, "window_size": 2, "cls_token": False}, "exclude one another"),
        ({"rope_base": 100.0, "width": 18, "absolute_positions": False}, "heads of a width divisible by 4, got 6"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(**options)
