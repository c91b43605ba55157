"""The masked autoencoder against Hugging Face's, and its own promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_transfer.errors import ConfigError
from pretrain import MaskedAutoencoder, build_mae
from tests.oracles import hf_keys, hf_mae

SMALL = {"size": "tiny", "image_size": 32, "patch_size": 8, "depth": 3, "decoder_depth": 2}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.6])
def test_equals_hugging_face(norm_pix_loss: bool, mask_ratio: float) -> None:
    torch.manual_seed(0)
    mae = build_mae(**SMALL, norm_pix_loss=norm_pix_loss, mask_ratio=mask_ratio).double()
    oracle = hf_mae(mae)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(3, 16, dtype=torch.float64)
    ours, theirs = mae(images, noise), oracle(images, noise=noise)
    torch.testing.assert_close(ours.loss.double(), theirs.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.prediction, theirs.logits, rtol=0, atol=1e-9)
    assert torch.equal(ours.mask, theirs.mask.float())

    ours.loss.backward()
    theirs.loss.backward()
    gradients = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    mine = hf_keys({name: p.grad for name, p in mae.named_parameters() if p.grad is not None})
    assert set(mine) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_equals_hugging_face_base_fp32() -> None:
    torch.manual_seed(0)
    mae = build_mae("mae_vit_base_patch16", norm_pix_loss=True, image_size=224, depth=4, decoder_depth=2)
    images, noise = torch.randn(1, 3, 224, 224), torch.rand(1, 196)
    with torch.no_grad():
        ours, theirs = mae(images, noise), hf_mae(mae)(images, noise=noise)
    assert ours.ids_visible.shape == (1, 49)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.prediction, theirs.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("mae_vit_base_patch16", 111.91), ("mae_vit_large_patch16", 329.54), ("mae_vit_huge_patch14", 657.07)],
)
def test_parameter_counts_of_the_release(name: str, millions: float) -> None:
    with torch.device("meta"):
        mae = build_mae(name)
    assert sum(p.numel() for p in mae.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_official_keys() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build_mae("mae_vit_base_patch16").state_dict().items()}
    block = {
        **{f"{norm}.{part}": None for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        **{
            f"{lin}.{part}": None
            for lin in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            for part in ("weight", "bias")
        },
    }
    expected = {
        *("cls_token", "pos_embed", "mask_token", "decoder_pos_embed"),
        *(
            f"{m}.{p}"
            for m in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
            for p in ("weight", "bias")
        ),
        *(f"blocks.{i}.{key}" for i in range(12) for key in block),
        *(f"decoder_blocks.{i}.{key}" for i in range(8) for key in block),
    }
    assert set(shapes) == expected
    assert shapes["pos_embed"] == (1, 197, 768)
    assert shapes["mask_token"] == (1, 1, 512)
    assert shapes["decoder_pred.weight"] == (768, 512)
    assert shapes["patch_embed.proj.weight"] == (768, 3, 16, 16)


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    p_h=st.integers(1, 5),
    p_w=st.integers(1, 5),
    channels=st.integers(1, 5),
    n=st.integers(1, 3),
)
def test_patchify_and_back_is_identity(h: int, w: int, p_h: int, p_w: int, channels: int, n: int) -> None:
    mae = build_mae(
        size="tiny", image_size=(h * p_h, w * p_w), patch_size=(p_h, p_w), channels=channels, depth=1, decoder_depth=1
    )
    images = torch.randn(n, channels, h * p_h, w * p_w)
    patches = mae.patchify(images)
    assert patches.shape == (n, h * w, p_h * p_w * channels)
    assert torch.equal(mae.unpatchify(patches), images)
    # Values are ordered row, column, channel: the first C values are the channels of the top left pixel.
    assert torch.equal(patches[:, 0, :channels], images[:, :, 0, 0])


def test_only_visible_patches_reach_the_encoder() -> None:
    """Changing hidden pixels changes the target and nothing that the encoder or the prediction says."""
    torch.manual_seed(0)
    mae = build_mae(**SMALL).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    first = mae(images, noise)
    patches = mae.patchify(images)
    hidden = first.mask[:, :, None] * torch.randn_like(patches)
    second = mae(mae.unpatchify(patches + hidden), noise)
    assert torch.equal(first.prediction, second.prediction)
    assert not torch.equal(first.loss, second.loss)


def test_patch_projection_is_the_convolution() -> None:
    torch.manual_seed(0)
    mae = build_mae(size="tiny", image_size=(24, 40), patch_size=8, depth=1, decoder_depth=1).double()
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    convolved = mae.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mae.patch_embed(images), convolved)


@pytest.mark.parametrize("image_size", [(32, 48), (40, 24)])
def test_other_image_sizes_and_channels(image_size: tuple[int, int]) -> None:
    mae = build_mae(**{**SMALL, "image_size": image_size}, channels=5)
    out = mae(torch.randn(2, 5, *image_size))
    num_patches = image_size[0] * image_size[1] // 64
    assert out.prediction.shape == (2, num_patches, 8 * 8 * 5)
    assert out.mask.sum(1).tolist() == [num_patches - int(num_patches * 0.25)] * 2
    resized = mae(torch.randn(2, 5, 64, 64))  # another size than it was built for
    assert resized.mask.shape == (2, 64)


def test_mask_tokens_in_the_encoder_is_the_ablation() -> None:
    """The encoder then sees all L tokens, and what it says of visible patches depends on where patches are hidden."""
    torch.manual_seed(0)
    mae = build_mae(**SMALL, mask_tokens_in_encoder=True)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    seen: list[torch.Size] = []
    mae.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    out = mae(images, noise)
    out.loss.backward()
    assert seen == [torch.Size([2, 17, 192])]
    assert mae.encoder_mask_token is not None and mae.encoder_mask_token.grad is not None
    assert "mask_token" not in mae.state_dict()
    assert all(p.grad is not None for p in mae.parameters() if p.requires_grad)


def test_every_trained_parameter_gets_a_gradient_and_positions_none() -> None:
    mae = build_mae(**SMALL)
    mae(torch.randn(2, 3, 32, 32)).loss.backward()
    without = {name for name, p in mae.named_parameters() if p.grad is None}
    assert without == {"pos_embed", "decoder_pos_embed"}


def test_initialisation_of_the_paper() -> None:
    torch.manual_seed(0)
    mae = build_mae(size="base", image_size=64, depth=1, decoder_depth=1)
    assert mae.cls_token is not None and mae.mask_token is not None
    assert mae.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert mae.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    for weight in (mae.blocks[0].mlp.fc1.weight, mae.patch_embed.proj.weight.flatten(1), mae.decoder_pred.weight):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    for name, p in mae.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not p.any(), name


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: build_mae("mae_vit_bse_patch16"), "did you mean mae_vit_base_patch16"),
        (lambda: build_mae(), "give either"),
        (lambda: build_mae(size="bsae"), "did you mean base"),
        (lambda: build_mae(size="tiny", decoder_deph=4), "did you mean decoder_depth"),
        (lambda: build_mae(size="tiny", image_size=30, patch_size=8), "nearest that is: 32x32"),
        (lambda: build_mae(**SMALL)(torch.randn(1, 3, 32, 32), torch.rand(1, 9)), r"need \(N, L\) = \(1, 16\)"),
        (lambda: build_mae(**SMALL)(torch.randn(1, 1, 32, 32)), "built for 3"),
        (lambda: build_mae(**SMALL)(torch.randn(1, 3, 32, 32), mask_ratio=0.99), "leaves 0 of 16"),
        (lambda: MaskedAutoencoder(window_size=2), "belong to the transfer models"),
    ],
)
def test_bad_input_is_named(call, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call()
