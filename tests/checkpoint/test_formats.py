"""What is written for another library loads there strictly, by the lines on its card, and computes the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_transfer import VisionTransformer, build_backbone, build_vit, load_backbone
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.checkpoint.convert import convert
from pretrain import build_mae

SMALL = {"width": 48, "depth": 2, "num_heads": 3, "patch_size": 8}


def saved(model: nn.Module, path: Path, **fields: Any) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    write_safetensors(path, model.state_dict(), describe(model, **fields).to_metadata())
    return path


def by_its_card(card: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The model that the card's own lines build and load."""
    code = re.search(r"## Use\n\n```python\n(.*?)\n```", card.read_text(), re.DOTALL)
    assert code
    found: dict[str, Any] = {}
    folder = card.parent.parent if (card.parent / "config.json").exists() else card.parent
    monkeypatch.chdir(folder)
    exec(code[1], found)
    return (found.get("model") or found["vit"]).eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["plain", "registers", "named"])
def test_timm_loads_strictly_and_computes_the_same(
    kind: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {} if kind == "plain" else {"num_registers": 2, "layer_scale": 1.0, "norm_eps": 1e-5}
    if kind == "registers":
        more |= {"ffn": "swiglu", "mlp_ratio": 2.0}
    vit = build_vit("tiny", image_size=(32, 48), **SMALL, **more)
    source = saved(vit, tmp_path / "x.safetensors")
    if kind == "named":  # as in timm's own models, no place for cls token and registers
        with torch.no_grad():
            vit.pos_embed[:, 0] = 0
        write_safetensors(source, vit.state_dict(), describe(vit).to_metadata())
    done = convert(source, tmp_path / f"timm{ending}", "timm")
    theirs = by_its_card(done.card, monkeypatch)
    assert kind == "plain" or theirs.no_embed_class is (kind == "named")
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(theirs.forward_features(images), vit(images), rtol=0, atol=1e-4)


def test_timm_takes_a_fine_tuned_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = build_vit("tiny", image_size=32, **SMALL)
    state = {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("norm.")}
    state |= {"fc_norm.weight": torch.rand(48), "fc_norm.bias": torch.rand(48)}
    state |= {"head.weight": torch.randn(5, 48), "head.bias": torch.randn(5)}
    torch.save({"model": state}, tmp_path / "tuned.pth")
    # The file does not say its heads; 48 wide is one.
    done = convert(tmp_path / "tuned.pth", tmp_path / "timm.safetensors", "timm")
    assert "cc-by-nc-4.0" in done.card.read_text()
    theirs = by_its_card(done.card, monkeypatch)
    body = build_vit("tiny", image_size=32, **{**SMALL, "num_heads": 1}, final_norm=False)
    load_backbone(body, tmp_path / "tuned.pth")
    images = torch.randn(2, 3, 32, 32)
    pooled = nn.functional.layer_norm(
        body(images)[:, 1:].mean(dim=1), (48,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6
    )
    torch.testing.assert_close(theirs(images), pooled @ state["head.weight"].T + state["head.bias"], rtol=0, atol=1e-4)


def _strictly(cls: type, folder: Path) -> nn.Module:
    model, loading = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return model.eval()


def test_transformers_loads_the_whole_autoencoder_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTMAEForPreTraining

    mae = build_mae(
        size="tiny", image_size=32, **SMALL, decoder_width=32, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True
    )
    source = saved(mae, tmp_path / "x.safetensors", decoder_num_heads=2, normalised_target=True)
    done = convert(source, tmp_path / "folder", "hf")
    theirs = _strictly(ViTMAEForPreTraining, done.destination)
    assert type(by_its_card(done.card, monkeypatch)) is ViTMAEForPreTraining
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    out, ours = theirs(images, noise=noise), mae(images, noise=noise)
    torch.testing.assert_close(out.logits, ours.prediction, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.loss, ours.loss, rtol=0, atol=1e-4)
    # What transformers saves again, without a word of ours in it, comes back to the bit.
    theirs.save_pretrained(tmp_path / "again")
    again = build_backbone(tmp_path / "again")
    assert all(torch.equal(tensor, mae.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_transformers_loads_an_oblong_encoder_strictly(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor, ViTMAEModel

    vit = build_vit("tiny", image_size=(32, 48), **SMALL, norm_eps=1e-5)
    source = saved(vit, tmp_path / "x.safetensors", mean=(0.1, 0.2, 0.3))
    folder = convert(source, tmp_path / "folder", "hf").destination
    theirs = _strictly(ViTMAEModel, folder)
    images, order = torch.randn(2, 3, 32, 48), torch.arange(24.0).expand(2, 24)
    torch.testing.assert_close(theirs(images, noise=order).last_hidden_state, vit(images), rtol=0, atol=1e-4)
    processor = ViTImageProcessor.from_pretrained(folder)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3) and dict(processor.size) == {"height": 32, "width": 48}


def test_detectron2s_own_vit_loads_its_format(tmp_path: Path) -> None:
    from detectron2.modeling.backbone.vit import ViT

    source = saved(build_vit("tiny", image_size=32, **SMALL), tmp_path / "x.safetensors")
    path = convert(source, tmp_path / "d2.pth", "detectron2").destination
    theirs = ViT(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, window_size=0, pretrain_img_size=32
    ).eval()
    state = {
        name.removeprefix("backbone.net."): tensor
        for name, tensor in torch.load(path, weights_only=True)["model"].items()
    }
    loading = theirs.load_state_dict(state, strict=False)
    assert not loading.missing_keys
    assert set(loading.unexpected_keys) == {"cls_token", "norm.weight", "norm.bias"}  # it has neither
    images = torch.randn(1, 3, 32, 32)
    assert_same_map(theirs(images)["last_feat"], path, images)
    mmseg = convert(source, tmp_path / "mm.pth", "mmseg").destination
    assert_same_map(theirs(images)["last_feat"], mmseg, images)


def assert_same_map(theirs: Tensor, path: Path, images: Tensor) -> None:
    ours = VisionTransformer(
        image_size=32, patch_size=8, width=48, depth=2, num_heads=3, cls_token=False, final_norm=False
    )
    load_backbone(ours, path)
    torch.testing.assert_close(ours.forward_taps(images, [1])[0], theirs, rtol=0, atol=1e-4)
