"""Layer decay against MMSegmentation's constructor and the paper's rule; mixed precision that is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from torch import nn

from mae_transfer.errors import ConfigError
from mae_transfer.segmentation.optimizer import MAEAmpOptimWrapper, MAEOptimWrapper, plain_name


def built(model: nn.Module, constructor: str, **options: Any) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter by name, as a constructor grouped them."""
    config = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.05},
        "constructor": constructor,
        "paramwise_cfg": options,
    }
    with DefaultScope.overwrite_default_scope("mmseg"):
        wrapper = build_optim_wrapper(model, config)
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Our segmentor, built once."""
    from mae_transfer.segmentation.config import derive
    from mae_transfer.segmentation.recipe import Facts
    from mae_transfer.segmentation.settings import read_settings

    facts = Facts(size="tiny", patch_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, classes=("a", "b", "c"))
    settings = read_settings({"dataset": {"crop_size": 64}, "encoder": {"size": "tiny"}, "head": {"channels": 32}})
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(derive(settings, facts, "run").model)


def theirs(model: nn.Module) -> nn.Module:
    """MMSegmentation's MAE under the parameter names and the class name that its constructor looks for."""

    class MAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in model.backbone.named_children():
                self.add_module("layers" if name == "blocks" else name, child)
            self.cls_token, self.pos_embed = model.backbone.cls_token, model.backbone.pos_embed

    host = nn.Module()
    host.backbone, host.neck, host.decode_head = MAE(), model.neck, model.decode_head
    host.auxiliary_head = model.auxiliary_head
    return host


def test_parity_groups_equal_mmsegs(model: nn.Module) -> None:
    ours = built(model, "MAELayerDecayConstructor", decay_rate=0.65, weight_decay_groups="parity")
    reference = built(
        theirs(model),
        "LearningRateDecayOptimizerConstructor",
        decay_rate=0.65,
        decay_type="layer_wise_vit",
        num_layers=12,
    )
    reference = {name.replace("backbone.layers.", "backbone.blocks."): value for name, value in reference.items()}
    assert ours.keys() == reference.keys()
    for name, (lr, decay) in reference.items():
        assert ours[name] == (pytest.approx(lr, rel=1e-9), decay), name


def test_every_parameter_follows_the_papers_rule(model: nn.Module) -> None:
    groups = built(model, "MAELayerDecayConstructor", decay_rate=0.65)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith("backbone."):
            layer = 0  # patch embedding, position embedding, cls token: there is no final norm
        else:
            layer = 13
        spared = parameter.ndim == 1 or any(part in name for part in ("pos_embed", "cls_token", "bias"))
        assert groups[name] == (pytest.approx(1e-4 * 0.65 ** (13 - layer)), 0.0 if spared else 0.05), name


def test_position_parameters_are_spared_weight_decay(model: nn.Module) -> None:
    clean = built(model, "MAELayerDecayConstructor", decay_rate=0.65)
    parity = built(model, "MAELayerDecayConstructor", decay_rate=0.65, weight_decay_groups="parity")
    changed = {name.split(".")[-1] for name in clean if clean[name] != parity[name]}
    assert changed == {"pos_embed", "cls_token", "relative_position_bias_table"}


@pytest.mark.parametrize("wrap", ["module", "compiled", "compiled backbone"])
def test_wrapping_changes_nothing(model: nn.Module, wrap: str) -> None:
    plain = built(model, "MAELayerDecayConstructor", decay_rate=0.65)

    class Wrapped(nn.Module):
        def __init__(self, attribute: str, inside: nn.Module) -> None:
            super().__init__()
            self.add_module(attribute, inside)

    if wrap == "module":
        host: nn.Module = Wrapped("module", model)
    elif wrap == "compiled":
        host = Wrapped("_orig_mod", model)
        host.backbone = model.backbone  # compiled modules pass attributes through
    else:
        host = nn.Module()
        host.backbone = Wrapped("_fsdp_wrapped_module", model.backbone)
        host.neck, host.decode_head, host.auxiliary_head = model.neck, model.decode_head, model.auxiliary_head
    wrapped = built(host, "MAELayerDecayConstructor", decay_rate=0.65)
    assert {name: value for name, value in wrapped.items() if name in plain} == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_rat": 0.65}, "did you mean paramwise_cfg.decay_rate"),
        ({"decay_rate": 0.65, "weight_decay_groups": "none"}, "clean, parity"),
        ({"decay_rate": 1.5}, "at most 1"),
    ],
)
def test_wrong_options_are_named(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(model, "MAELayerDecayConstructor", **options)


def test_a_foreign_backbone_is_refused() -> None:
    host = nn.Module()
    host.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="MAEViT"):
        built(host, "MAELayerDecayConstructor", decay_rate=0.65)


def test_bf16_is_on_inside_and_weights_stay_fp32() -> None:
    layer = nn.Linear(4, 4)
    wrapper = MAEAmpOptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))
    before = layer.weight.detach().clone()
    with wrapper.optim_context(layer):
        out = layer(torch.ones(2, 4))
        loss = out.float().sum()
    assert out.dtype == torch.bfloat16
    wrapper.update_params(loss)
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight, before - 0.1 * 2 * torch.ones(4, 4))
    wrapper.load_state_dict(wrapper.state_dict())


def test_other_precisions_are_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="expected bfloat16 or float16"):
        MAEAmpOptimWrapper(dtype="float64", optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))


def test_the_loss_scale_of_fp16_is_saved_and_gone_on_with() -> None:
    def build() -> MAEAmpOptimWrapper:
        layer = nn.Linear(4, 4)
        return MAEAmpOptimWrapper(dtype="float16", optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))

    wrapper = build()
    (weight, _), scale = wrapper.optimizer.param_groups[0]["params"], wrapper.loss_scaler.get_scale()
    wrapper.update_params(weight.sum() * float("inf"))  # overflows: the step is left out and the scale halved
    assert wrapper.loss_scaler.get_scale() == scale / 2
    other = build()
    other.load_state_dict(wrapper.state_dict())
    assert other.loss_scaler.state_dict() == wrapper.loss_scaler.state_dict()
    assert other.loss_scaler.get_scale() == scale / 2


@pytest.mark.parametrize("kind", [MAEOptimWrapper, MAEAmpOptimWrapper])
def test_clipping_is_torchs(kind: type) -> None:
    layer, reference = nn.Linear(4, 4), nn.Linear(4, 4)
    reference.load_state_dict(layer.state_dict())
    wrapper = kind(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1), clip_grad={"max_norm": 0.5})
    batch = torch.randn(8, 4)
    wrapper.update_params(layer(batch).square().sum())
    reference(batch).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert wrapper.message_hub.get_scalar("train/grad_norm").current() == pytest.approx(float(norm))
    for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
