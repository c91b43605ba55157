"""Variants of the model: CrossMAE's decoder against its formulae written out, and learned positions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_transfer import build_vit, load_backbone
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.checkpoint.convert import convert
from mae_transfer.engine.config import read_config
from mae_transfer.errors import ConfigError, run_tool
from mae_transfer.position import sincos_2d
from pretrain import MaskedAutoencoder, build_mae
from pretrain.cli import main
from pretrain.config import PretrainConfig
from pretrain.cross_decoder import num_predicted
from pretrain.load import load_mae
from pretrain.objective import build_model
from pretrain.reconstruct import main as reconstruct
from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS, timeless

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "pretrain" / "tiny.yaml")
SMALL = {
    "size": "tiny",
    "image_size": (32, 48),
    "patch_size": 8,
    "width": 32,
    "depth": 3,
    "num_heads": 2,
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}


def cross(**more: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = build_mae(**{**SMALL, "decoder": "cross", **more}).double()
    for name, p in model.named_parameters():  # zero biases and unit norms would hide mistakes
        if p.requires_grad and p.ndim == 1:
            nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.3)
    return model


def literal(model: MaskedAutoencoder, images: Tensor, noise: Tensor, *, fuse: bool) -> Tensor:
    """The prediction of CrossMAE for every patch, (N, L, p·p·C), image by image and token by token from torch's own
    attention (nn.MultiheadAttention with keys of another width), written from the paper; weights are read by name."""
    state = model.state_dict()
    eps, p = 1e-6, 8
    results = []
    for image, ranks in zip(images, noise, strict=True):
        h, w = image.shape[1] // p, image.shape[2] // p
        order = ranks.argsort()
        visible = order[: int(len(ranks) * 0.25)]
        kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
        tokens = F.conv2d(image[None], kernel, bias, stride=p)[0].flatten(1).T + state["pos_embed"][0, 1:]
        x = torch.cat([state["cls_token"][0], tokens[visible]])
        features = [x]
        for block in model.blocks:
            x = block(x[None])[0]
            features.append(x)
        stream = torch.stack([state["mask_token"][0, 0] + row for row in state["decoder_pos_embed"][0, 1:]])
        assert stream.shape[0] == h * w
        for j in range(2):
            if fuse:
                memory = sum(state["wfm.linear.weight"][j, i] * feature for i, feature in enumerate(features))
                memory = F.layer_norm(
                    memory, (32,), state[f"dec_norms.{j}.weight"], state[f"dec_norms.{j}.bias"], eps=eps
                )
            else:
                memory = F.layer_norm(x, (32,), state["norm.weight"], state["norm.bias"], eps=eps)
            own = {
                name.removeprefix(f"decoder_blocks.{j}."): value
                for name, value in state.items()
                if name.startswith(f"decoder_blocks.{j}.")
            }
            attention = nn.MultiheadAttention(24, 3, kdim=32, vdim=32, batch_first=True).double()
            key, value = own["cross_attn.kv.weight"].chunk(2)
            attention.load_state_dict(
                {
                    "q_proj_weight": own["cross_attn.q.weight"],
                    "k_proj_weight": key,
                    "v_proj_weight": value,
                    "in_proj_bias": torch.cat([own["cross_attn.q.bias"], own["cross_attn.kv.bias"]]),
                    "out_proj.weight": own["cross_attn.proj.weight"],
                    "out_proj.bias": own["cross_attn.proj.bias"],
                }
            )
            rows = []
            for token in stream:  # one at a time: no token can see another
                query = F.layer_norm(token, (24,), own["norm1.weight"], own["norm1.bias"], eps=eps)
                token = token + attention(query[None, None], memory[None], memory[None])[0][0, 0]
                hidden = F.layer_norm(token, (24,), own["norm2.weight"], own["norm2.bias"], eps=eps)
                hidden = own["mlp.fc1.weight"] @ hidden + own["mlp.fc1.bias"]
                hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
                rows.append(token + own["mlp.fc2.weight"] @ hidden + own["mlp.fc2.bias"])
            stream = torch.stack(rows)
        stream = F.layer_norm(stream, (24,), state["decoder_norm.weight"], state["decoder_norm.bias"], eps=eps)
        results.append(stream @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])
    return torch.stack(results)


@pytest.mark.parametrize("fuse", [True, False])
def test_cross_decoder_is_the_papers(fuse: bool) -> None:
    model = cross(cross_fuse_features=fuse, norm_pix_loss=False).eval()
    images, noise = torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.rand(2, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = literal(model, images, noise, fuse=fuse)
        evaluated = model(images, noise)
        trained = model.train()(images, noise)
    torch.testing.assert_close(evaluated.prediction, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(trained.prediction, expected, rtol=0, atol=1e-10)
    # In evaluation the loss is of every masked patch, while training of those that come next in the noise.
    errors = (expected - model.patchify(images)).square().mean(dim=2)
    torch.testing.assert_close(evaluated.loss.double(), errors[evaluated.mask.bool()].mean())
    order = noise.argsort(dim=1)
    assert torch.equal(trained.ids_predicted, order[:, 6:12]) and torch.equal(evaluated.ids_predicted, order[:, 6:])
    torch.testing.assert_close(trained.loss.double(), errors.gather(1, trained.ids_predicted).mean())


def test_what_is_predicted_depends_on_the_noise_alone() -> None:
    model = cross()
    images, noise = torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.rand(2, 24, dtype=torch.float64)
    state = torch.get_rng_state()
    first = model(images, noise)
    assert torch.equal(torch.get_rng_state(), state)
    alone = model(images[1:], noise[1:])
    assert torch.equal(first.ids_predicted[1:], alone.ids_predicted)
    whole = build_mae(**SMALL, decoder="cross", cross_prediction_ratio=0.75).double()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(whole(images, noise).loss, model.eval()(images, noise).loss)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_reach_everything_and_are_those_of_the_subset(fuse: bool, checkpointing: bool) -> None:
    model = cross(cross_fuse_features=fuse, positions="learned", checkpointing=checkpointing, norm_pix_loss=False)
    images, noise = torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.rand(2, 24, dtype=torch.float64)
    out = model(images, noise)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.any() for g in gradients.values()), [n for n, g in gradients.items() if g is None]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"norm.weight", "norm.bias"} if fuse else set())
    model.zero_grad()
    rows = out.ids_predicted[:, :, None]
    full = model(images, noise).prediction - model.patchify(images)
    full.gather(1, rows.expand(-1, -1, full.shape[2])).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n} {m}")


def test_keys_of_the_cross_decoder() -> None:
    plain, crossed = build_mae(**SMALL).state_dict(), cross().state_dict()
    encoder = {name for name in plain if not name.startswith(("decoder_", "mask_token"))}
    assert encoder == {
        name for name in crossed if not name.startswith(("decoder_", "mask_token", "wfm.", "dec_norms."))
    }
    assert "decoder_embed.weight" not in crossed and not any(".attn." in n for n in crossed if "decoder" in n)
    assert crossed["decoder_blocks.1.cross_attn.kv.weight"].shape == (48, 32)
    assert crossed["wfm.linear.weight"].shape == (2, 4)
    assert not any(n.startswith(("wfm", "dec_norms")) for n in cross(cross_fuse_features=False).state_dict())


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, 49), (0.75, 147), (1.0, 147), (0.001, 1)])
def test_number_of_predicted_patches(ratio: float, expected: int) -> None:
    assert num_predicted(196, 147, ratio) == expected


def test_learned_positions_start_at_the_table_and_train() -> None:
    model = build_mae(**SMALL, positions="learned")
    assert torch.equal(model.pos_embed, sincos_2d(32, (4, 6)))
    assert torch.equal(model.decoder_pos_embed, sincos_2d(24, (4, 6)))
    out = model(torch.randn(2, 3, 32, 48))
    out.loss.backward()
    assert model.pos_embed.grad is not None and model.decoder_pos_embed.grad is not None
    seen = (out.mask == 0).any(dim=0)
    assert torch.equal(model.pos_embed.grad[0, 1:].any(dim=1), seen) and model.pos_embed.grad[0, 0].any()
    assert model.decoder_pos_embed.grad[0].any(dim=1).all()
    assert list(model.state_dict()) == list(build_mae(**SMALL).state_dict())


def run(pictures: Path, folder: Path, *more: str) -> int:
    return run_tool(main, [TINY, f"data.path={pictures}", f"run.dir={folder}", *ARGUMENTS, "train.steps=4", *more])


@pytest.mark.parametrize(
    "variant",
    [
        ("model.decoder=cross",),
        ("model.decoder=cross", "model.cross_fuse_features=false", "mask.kind=block", "mask.ratio=0.5"),
        ("model.positions=learned",),
    ],
)
def test_a_run_of_a_variant(variant: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, evaluated, shown, loaded and converted as any other."""
    pictures = write_pictures(tmp_path / "pictures", 12)
    folder = tmp_path / "run"
    more = (*variant, f"data.val_path={pictures}", "log.reconstruct_every_epochs=2")
    assert run(pictures, folder, *more) == 0
    loaded = load_mae(folder)
    config = read_config(PretrainConfig, TINY, [*ARGUMENTS, *variant])
    for attribute in ("decoder", "positions", "cross_prediction_ratio"):
        assert getattr(loaded.model, attribute) == getattr(config.model, attribute)
    fresh = build_model(config)
    assert list(fresh.state_dict()) == list(loaded.model.state_dict())
    moved = not torch.equal(fresh.pos_embed, loaded.model.pos_embed)
    assert moved == (config.model.positions == "learned")
    if config.model.decoder == "cross" and config.model.cross_fuse_features:
        assert torch.equal(loaded.model.norm.weight, torch.ones(32)), "the encoder's last norm stays as initialised"
    capsys.readouterr()
    evaluate = ["--evaluate", str(folder), f"data.val_path={pictures}", "train.precision=fp32"]
    assert run_tool(main, [TINY, *evaluate, *[v for v in variant if v.startswith("mask.")]]) == 0
    assert "12 images" in capsys.readouterr().out
    image = next(path for path in pictures.iterdir() if path.suffix.lower() in (".jpg", ".png", ".jpeg"))
    assert reconstruct([str(folder), str(image), "--out", str(tmp_path / "out.png")]) == 0
    # The encoder reaches its hosts, positions included.
    vit = build_vit(size="tiny", width=32, depth=2, num_heads=2, patch_size=4, image_size=16)
    report = load_backbone(vit, folder / "encoder.safetensors")
    assert not report.missing and not report.unexpected and torch.equal(vit.pos_embed, loaded.model.pos_embed)
    assert not load_backbone(vit, folder / "model.safetensors").missing
    convert(folder / "model.safetensors", tmp_path / "official.pth", "mae")
    back = load_mae(tmp_path / "official.pth").model.state_dict()
    assert all(torch.equal(value, back[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_train_a_variant_as_one_does(strategy: str, tmp_path: Path) -> None:
    """Frozen and trained tables, blocks of another kind and small modules beside them, whole and in shards."""
    pictures = write_pictures(tmp_path / "pictures", 12)
    more = ("model.decoder=cross", "model.positions=learned", f"data.val_path={pictures}", "optim.clip_grad=1")
    assert run(pictures, tmp_path / "one", *more) == 0
    command = [TINY, f"data.path={pictures}", f"run.dir={tmp_path / 'two'}", *ARGUMENTS, "train.steps=4", *more]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(ROOT / "tools" / "pretrain.py"), *command, f"train.distributed={strategy}"],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = (timeless(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for expected, line in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)
    states = [load_mae(tmp_path / name).model.state_dict() for name in ("one", "two")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_metadata_of_a_file_rebuilds_the_model(tmp_path: Path) -> None:
    model = build_mae(**SMALL, decoder="cross", cross_prediction_ratio=0.5, positions="learned")
    info = describe(model, decoder_num_heads=3, positions="learned", cross_prediction_ratio=0.5)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), info.to_metadata())
    again = load_mae(tmp_path / "model.safetensors").model
    assert (again.decoder, again.cross_prediction_ratio, again.positions) == ("cross", 0.5, "learned")
    assert again.pos_embed.requires_grad and again.wfm is not None


def test_a_file_of_crossmaes_own_code(tmp_path: Path) -> None:
    """{"model": …}, no metadata, no last norm of the encoder; heads follow from the width."""
    torch.manual_seed(0)
    model = build_mae(size="base", image_size=64, depth=2, decoder_depth=3, decoder="cross").eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("norm.")}
    torch.save({"model": state, "epoch": 799}, tmp_path / "checkpoint.pth")
    again = load_mae(tmp_path / "checkpoint.pth").model
    images, noise = torch.randn(1, 3, 64, 64), torch.rand(1, 16)
    with torch.no_grad():
        assert torch.equal(again(images, noise).prediction, model(images, noise).prediction)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model.positions=rope",), "use sincos or learned"),
        (("model.decoder=none",), "use self or cross"),
        (("model.decoder=cross", "model.cross_prediction_ratio=0"), "share of all patches"),
        (("model.decoder=cross", "model.cross_prediction_ratio=0.9"), "at most the mask ratio"),
        (("model.decoder=cross", "model.mask_tokens_in_encoder=true"), "give one of them"),
    ],
)
def test_bad_variants_are_named(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_config(PretrainConfig, TINY, overrides)


def test_print_config_shows_the_variants(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(main, [TINY, "model.decoder=cross", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "decoder: cross" in shown and "cross_prediction_ratio: 0.25" in shown and "positions: sincos" in shown
