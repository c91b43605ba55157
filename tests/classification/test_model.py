"""The classifier: released checkpoints, what trains in each protocol, and what is left alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from mae_transfer import build_vit
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.classification.model import Classifier, FeatureNorm, load_classifier, load_encoder
from mae_transfer.errors import CheckpointError, ConfigError

SMALL = {"image_size": 32, "patch_size": 8, "width": 64, "depth": 3, "num_heads": 1}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**options: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**{"num_classes": 5, **SMALL, **options})  # type: ignore[arg-type]


def timm_vit(pool: str) -> nn.Module:
    """timm's model with random weights, as the released code builds it for fine-tuning."""
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=1, num_classes=5,
        global_pool=pool, class_token=True, fc_norm=pool == "avg", norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_released_fine_tuned_file_evaluates(pool: str, tmp_path: Path) -> None:
    """{"model": …} with ``fc_norm`` and ``head``, as mae_finetuned_vit_base.pth: logits are timm's."""
    theirs = timm_vit(pool)
    torch.save({"model": theirs.state_dict()}, tmp_path / "finetuned.pth")
    loaded = load_classifier(tmp_path / "finetuned.pth")
    assert loaded.model.pool == {"avg": "mean", "token": "cls"}[pool] and loaded.classes is None
    assert set(loaded.model.state_dict()) == set(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_released_linear_probe_evaluates(tmp_path: Path) -> None:
    """main_linprobe.py puts a BatchNorm without affine parameters and the layer into ``head``."""
    theirs = timm_vit("token")
    probe = nn.Sequential(nn.BatchNorm1d(64, affine=False, eps=1e-6), theirs.head)
    nn.init.normal_(probe[0].running_mean, std=0.1)
    theirs.head = probe.eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "probe.pth")
    loaded = load_classifier(tmp_path / "probe.pth")
    assert loaded.model.probe and set(loaded.model.state_dict()) == set(theirs.state_dict())
    with torch.no_grad():
        expected = probe(theirs.forward_head(theirs.forward_features(IMAGES), pre_logits=True))
        torch.testing.assert_close(loaded.model(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_first_weights_of_the_head() -> None:
    wide = {"num_classes": 400, **SMALL}
    fine, probe = small(**wide), small(**wide, probe=True)
    assert fine.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)  # type: ignore[union-attr]
    assert probe.head[1].weight.std().item() == pytest.approx(0.01, rel=0.05)  # type: ignore[index]
    assert not fine.head.bias.any() and not probe.head[1].bias.any()  # type: ignore[union-attr,index]


def test_pooling_and_norms() -> None:
    """fc_norm takes the place of norm where patch tokens are averaged; a probe keeps the pretrained norm."""
    fine, cls, probe = small(), small(pool="cls"), small(probe=True)
    assert {"fc_norm.weight", "head.weight"} < set(fine.state_dict()) and "norm.weight" not in fine.state_dict()
    assert "norm.weight" in cls.state_dict() and "fc_norm.weight" not in cls.state_dict()
    assert "norm.weight" in probe.state_dict() and "fc_norm.weight" not in probe.state_dict()
    encoder = build_vit(**SMALL)
    encoder.load_state_dict({name: tensor for name, tensor in probe.state_dict().items() if "head" not in name})
    tokens = encoder.forward_features(IMAGES)
    torch.testing.assert_close(probe.encode(IMAGES), tokens[:, 1:].mean(1))
    torch.testing.assert_close(small(probe=True, pool="cls").encode(IMAGES), tokens[:, 0])


def test_feature_norm_is_batch_norm() -> None:
    ours, theirs = FeatureNorm(6), nn.BatchNorm1d(6, affine=False, eps=1e-6)
    for _ in range(3):
        features = torch.randn(7, 6) * 3 + 1
        assert torch.equal(ours(features), theirs(features))
    assert torch.equal(ours.eval()(features), theirs.eval()(features))


def trained(model: Classifier) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def blocks(model: Classifier, first: int) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("blocks.") and int(name[7]) >= first}


@pytest.mark.parametrize(
    ("number", "whole", "half"), [(0, 3, None), (0.5, 3, 2), (1, 2, None), (1.5, 2, 1), (2, 1, None), (3, 0, None)]
)
def test_partial_fine_tuning_trains_the_last_blocks(number: float, whole: int, half: int | None) -> None:
    model = small()
    model.train_last(number)
    expected = blocks(model, whole) | {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    if half is not None:
        parts = ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
        expected |= {f"blocks.{half}.{part}" for part in parts}
    assert trained(model) == expected
    # Every one of them learns, and nothing else has a gradient.
    model.head.reset_parameters()  # type: ignore[union-attr,operator]  # of 2e-5 to begin with
    model.train()(IMAGES).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


def test_partial_fine_tuning_computes_what_the_whole_model_does() -> None:
    """Frozen blocks run without keeping anything; gradients of the rest are those of full fine-tuning."""
    whole, partly = small(), small()
    partly.train_last(1.5)
    for model in (whole, partly):
        model(IMAGES).square().sum().backward()
    for name, parameter in partly.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, whole.get_parameter(name).grad), name  # type: ignore[arg-type]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        small_loss = partly(IMAGES).sum()
    few = len(kept)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        whole(IMAGES).sum()
    assert small_loss.requires_grad and few < 0.6 * (len(kept) - few)


def test_norm_trains_with_a_block_and_never_alone() -> None:
    model = small(pool="cls")
    model.train_last(0)
    assert trained(model) == {"head.weight", "head.bias"}
    model.train_last(0.5)
    assert {"norm.weight", "norm.bias"} < trained(model)
    with pytest.raises(ConfigError, match=r"partial\.blocks=4: the encoder has 3 blocks"):
        model.train_last(4)


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model = small(drop_path=0.5)
    model.train_last(1)
    model.train()
    assert [block.training for block in model.blocks] == [False, False, True] and model.head.training
    probe = small(probe=True, drop_path=0.5)
    probe.train_last(0)
    probe.train()
    assert not any(part.training for part in (probe.patch_embed, *probe.blocks, probe.norm))
    assert probe.head[0].training, "the batch normalisation in front of the layer learns its statistics"  # type: ignore[index]
    assert torch.equal(probe.encode(IMAGES), probe.encode(IMAGES)), "nothing is dropped"


def test_starting_from_an_encoder(tmp_path: Path) -> None:
    """Strictly; a head of other classes is left out, fc_norm starts at one and trains."""
    vit = build_vit(**SMALL)
    write_safetensors(tmp_path / "encoder.safetensors", vit.state_dict(), describe(vit).to_metadata())
    model = small()
    report = load_encoder(model, tmp_path)
    assert torch.equal(model.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    torch.save({"model": timm_vit("token").state_dict()}, tmp_path / "supervised.pth")
    other = small(num_classes=9, pool="cls")
    assert "head.weight" in load_encoder(other, tmp_path / "supervised.pth").missing and len(other.head.weight) == 9  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"does not fit"):
        load_encoder(small(width=32), tmp_path)


@pytest.mark.parametrize("options", [{}, {"pool": "cls"}, {"probe": True}, {"probe": True, "pool": "cls"}])
def test_a_classifier_reads_back_as_it_was(options: dict[str, object], tmp_path: Path) -> None:
    model = small(**options).eval()
    names = {"classes": json.dumps(["a", "b", "c", "d", "e"]), "pool": model.pool}
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), {**describe(model).to_metadata(), **names})
    loaded = load_classifier(tmp_path)
    assert loaded.classes == ["a", "b", "c", "d", "e"] and not loaded.model.training
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))
    larger = load_classifier(tmp_path, image_size=(48, 64)).model
    assert larger(torch.zeros(1, 3, 48, 64)).shape == (1, 5)


def test_an_encoder_is_no_classifier(tmp_path: Path) -> None:
    vit = build_vit(**SMALL)
    write_safetensors(tmp_path / "encoder.safetensors", vit.state_dict(), describe(vit).to_metadata())
    with pytest.raises(CheckpointError, match=r"has no classification head"):
        load_classifier(tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors"):
        load_classifier(tmp_path)
