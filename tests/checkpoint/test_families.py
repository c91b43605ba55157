"""Each family's own model, in its own file, read by ours: the same features. And one damaged file of each.

The architecture of the encoder comes from the file alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_transfer import VisionTransformer, build_backbone, load_backbone
from mae_transfer.checkpoint import read_checkpoint, write_safetensors
from mae_transfer.checkpoint.families import FAMILIES, nearest
from mae_transfer.errors import CheckpointError
from pretrain import build_mae
from pretrain.load import load_mae

SIZE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 64, 3, 1  # our rule for a file that does not say: 64 wide a head


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def draw(model: nn.Module) -> nn.Module:
    """Weights that no two parameters share and none is left at zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue  # a table of positions that is known by being what it is
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A file of a family and what its own implementation makes of images: (N, tokens, D) after the last norm."""

    family: str
    path: Path
    features: Callable[[Tensor], Tensor]


def timm_model(**arguments: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    numbers = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return draw(VisionTransformer(**{**numbers, "num_classes": 10, **arguments}))


def save_timm(folder: Path, **arguments: Any) -> Sample:
    model = timm_model(**arguments)
    path = folder / "timm.safetensors"
    write_safetensors(path, model.state_dict(), {"format": "pt"})
    return Sample(family="vit", path=path, features=model.forward_features)


def save_timm_training(folder: Path) -> Sample:
    """As timm's training script saves: with its arguments and an average of the weights."""
    model = timm_model()
    path = folder / "model_best.pth.tar"
    content = {"epoch": 3, "arch": "vit_tiny", "state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save({**content, "metric": np.float64(81.5), "rng_state": torch.get_rng_state()}, path)
    return Sample(family="vit", path=path, features=model.forward_features)


def save_deit_distilled(folder: Path) -> Sample:
    from timm.models.deit import VisionTransformerDistilled

    numbers = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model: Any = draw(VisionTransformerDistilled(**numbers, num_classes=10))
    path = folder / "deit_tiny_distilled_patch16_224.pth"
    torch.save({"model": model.state_dict()}, path)
    return Sample(family="deit-distilled", path=path, features=model.forward_features)


def save_moco(folder: Path) -> Sample:
    """``main_moco.py``: the trained and the momentum encoder under DistributedDataParallel, with their projectors."""
    model, momentum = timm_model(), timm_model()
    draw(momentum)
    state = {f"module.momentum_encoder.{name}": tensor for name, tensor in momentum.state_dict().items()}
    state |= {f"module.base_encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {
        "module.base_encoder.head.0.weight": torch.randn(8, WIDTH),
        "module.predictor.0.weight": torch.randn(8, 8),
    }
    path = folder / "vit-b-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {}}}, path)
    return Sample(family="moco-v3", path=path, features=model.forward_features)


def save_dino(folder: Path) -> Sample:
    """``main_dino.py``: student under DistributedDataParallel, teacher, both with their heads."""
    model, student = timm_model(num_classes=0), timm_model(num_classes=0)
    draw(student)
    heads = {"head.mlp.0.weight": torch.randn(8, WIDTH), "head.last_layer.weight_v": torch.randn(8, 8)}
    content = {
        "student": {f"module.backbone.{name}": tensor for name, tensor in student.state_dict().items()}
        | {f"module.{name}": tensor for name, tensor in heads.items()},
        "teacher": {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()} | heads,
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 100,
    }
    path = folder / "dino_deitsmall16_pretrain_full_checkpoint.pth"
    torch.save(content, path)
    return Sample(family="dino", path=path, features=model.forward_features)


def save_dino_backbone(folder: Path) -> Sample:
    model = timm_model(num_classes=0)
    path = folder / "dino_vitbase16_pretrain.pth"
    torch.save(model.state_dict(), path)
    return Sample(family="vit", path=path, features=model.forward_features)


def huggingface(**more: Any) -> dict[str, Any]:
    numbers = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
    }
    return {**numbers, "image_size": SIZE, "patch_size": PATCH, **more}


def save_hf(folder: Path, model: Any, family: str, features: Callable[[Tensor], Tensor]) -> Sample:
    draw(model)
    model.save_pretrained(folder)
    return Sample(family=family, path=folder, features=features)


def save_hf_vit(folder: Path) -> Sample:
    import transformers

    model = transformers.ViTForImageClassification(transformers.ViTConfig(**huggingface()))
    return save_hf(folder, model, "hf-vit", lambda images: model.vit(images).last_hidden_state)


def save_hf_bare(folder: Path) -> Sample:
    import transformers

    model = transformers.ViTModel(transformers.ViTConfig(**huggingface(qkv_bias=False)), add_pooling_layer=False)
    return save_hf(folder, model, "hf-vit", lambda images: model(images).last_hidden_state)


def save_hf_vitmae(folder: Path) -> Sample:
    import transformers

    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    config = transformers.ViTMAEConfig(**huggingface(**decoder, decoder_intermediate_size=64, mask_ratio=0.0))
    model = transformers.ViTMAEForPreTraining(config)

    def in_order(images: Tensor) -> Tensor:
        """ViTMAE shuffles its patches, masked or not."""
        noise = torch.arange((SIZE // PATCH) ** 2).float().expand(len(images), -1)
        return model.vit(images, noise=noise).last_hidden_state

    return save_hf(folder, model, "hf-vitmae", in_order)


def save_hf_deit(folder: Path) -> Sample:
    import transformers

    model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**huggingface()))
    return save_hf(folder, model, "hf-deit", lambda images: model.deit(images).last_hidden_state)


def save_mae(folder: Path, name: str, content: Callable[[dict[str, Tensor]], Any], family: str) -> Sample:
    """Our masked autoencoder has the official keys; its own oracle is tests/pretrain/test_model.py."""
    decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    numbers = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = build_mae("mae_vit_base_patch16", **numbers, **decoder)
    draw(model)
    path = folder / name
    torch.save(content(model.state_dict()), path)
    return Sample(family=family, path=path, features=model.forward_features)


def save_mae_training(folder: Path) -> Sample:
    """``main_pretrain.py``: with its optimiser, its scaler and its arguments."""

    def content(state: dict[str, Tensor]) -> dict[str, Any]:
        more = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 799, "scaler": {"scale": 65536.0}}
        return {"model": state, **more, "args": argparse.Namespace(model="mae_vit_base_patch16", output_dir=".")}

    return save_mae(folder, "checkpoint-799.pth", content, "mae")


def save_mae_encoder(folder: Path) -> Sample:
    """``mae_pretrain_vit_base.pth``: the encoder alone."""

    def content(state: dict[str, Tensor]) -> dict[str, Any]:
        return {"model": {name: tensor for name, tensor in state.items() if not name.startswith(("decoder", "mask"))}}

    return save_mae(folder, "mae_pretrain_vit_base.pth", content, "mae")


def save_mae_finetuned(folder: Path) -> Sample:
    """``mae_finetuned_vit_base.pth``: ``models_vit.py`` is timm's model with ``fc_norm`` in the last norm's place."""
    model = timm_model(global_pool="avg", fc_norm=True)
    path = folder / "mae_finetuned_vit_base.pth"
    torch.save({"model": model.state_dict()}, path)
    return Sample(family="mae-finetuned", path=path, features=model.forward_features)


def save_deit3(folder: Path) -> Sample:
    """``deit_3_base_224_1k.pth``: official names of the layer scale, and no position of the cls token."""
    model = timm_model(init_values=0.5, no_embed_class=True)
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in model.state_dict().items()
    }
    path = folder / "deit_3_base_224_1k.pth"
    torch.save({"model": state}, path)
    return Sample(family="vit", path=path, features=model.forward_features)


def save_mae_visualize(folder: Path) -> Sample:
    return save_mae(folder, "mae_visualize_vit_base.pth", lambda state: {"model": state}, "mae")


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    "timm": save_timm,
    "timm, registers": lambda folder: save_timm(folder, reg_tokens=4, no_embed_class=True),
    "timm, training": save_timm_training,
    "deit, distilled": save_deit_distilled,
    "moco v3": save_moco,
    "dino, training": save_dino,
    "dino": save_dino_backbone,
    "mae, training": save_mae_training,
    "mae, encoder": save_mae_encoder,
    "mae, visualize": save_mae_visualize,
    "mae, fine-tuned": save_mae_finetuned,
    "deit iii": save_deit3,
    "timm, deit iii": lambda folder: save_timm(folder, init_values=0.5, no_embed_class=True),
    "hf vit": save_hf_vit,
    "hf vit without biases of q, k and v": save_hf_bare,
    "hf vitmae": save_hf_vitmae,
    "hf deit": save_hf_deit,
}


@pytest.fixture(params=SAMPLES, scope="module")
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    if request.param.startswith("hf"):
        pytest.importorskip("transformers")
    return SAMPLES[request.param](tmp_path_factory.mktemp("family"))


def test_the_features_are_those_of_the_familys_own_model(sample: Sample, images: Tensor) -> None:
    vit = build_backbone(sample.path).eval()
    with torch.no_grad():
        expected = sample.features(images)
        torch.testing.assert_close(vit.forward_features(images), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


def test_the_file_alone_says_whose_it_is(sample: Sample) -> None:
    checkpoint = read_checkpoint(sample.path)
    info = checkpoint.info
    assert checkpoint.family == info.family == sample.family
    assert (info.width, info.depth, info.patch_size, info.image_size) == (WIDTH, DEPTH, (PATCH, PATCH), (SIZE, SIZE))
    assert info.num_heads == (4 if sample.family.startswith("hf") else HEADS)


def tensors_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from mae_transfer.checkpoint.read import read_tensors

    return load_file(path / "model.safetensors") if path.is_dir() else read_tensors(path)[0]


def damaged(sample: Sample, folder: Path, spoil: Callable[[dict[str, Tensor]], None]) -> Path:
    """The sample's tensors, spoilt, in a file of the same kind."""
    tensors = tensors_of(sample.path)
    spoil(tensors)
    if sample.path.is_dir():
        write_safetensors(folder / "model.safetensors", tensors, {})
        (folder / "config.json").write_text((sample.path / "config.json").read_text())
        return folder
    path = folder / sample.path.name
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, {})
    else:
        torch.save({"model": tensors}, path)
    return path


def last_of(tensors: dict[str, Tensor], *endings: str) -> str:
    return next(name for name in reversed(list(tensors)) if name.endswith(endings))


def test_a_file_that_lacks_a_tensor_is_refused_by_name(sample: Sample, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in [
            name for name in tensors if ".1." in name and name.endswith(("fc1.weight", "intermediate.dense.weight"))
        ]:
            del tensors[name]

    with pytest.raises(
        CheckpointError, match=r"looks like .*missing blocks\.1\.mlp\.fc1\.weight.*damaged or incomplete"
    ):
        read_checkpoint(damaged(sample, tmp_path, spoil))


def test_a_tensor_of_another_shape_is_refused_by_name(sample: Sample, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("norm2.weight", "layernorm_after.weight"))]:
            tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(CheckpointError, match=r"norm2\.weight is \(63,\), expected \(64,\)"):
        read_checkpoint(damaged(sample, tmp_path, spoil))


def test_a_truncated_file_is_refused_by_name(sample: Sample, tmp_path: Path) -> None:
    path = damaged(sample, tmp_path, lambda tensors: None)
    file = path / "model.safetensors" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=file.name):
        read_checkpoint(path)


def test_what_is_not_known_is_told_what_is_nearest(tmp_path: Path) -> None:
    model = timm_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "pos_embed"}
    family, share = nearest(state)
    assert family.anchor == "patch_embed.proj.weight" and 0.5 < share < 1
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"no known family .*nearest is .*, of which it lacks .*pos_embed"):
        read_checkpoint(path)


@pytest.mark.parametrize(("arguments", "what"), [({"pre_norm": True}, "CLIP"), ({"qk_norm": True}, "queries and keys")])
def test_blocks_that_compute_something_else_are_refused(arguments: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(save_timm(tmp_path, **arguments).path)


def test_moco_v3s_small_model_has_twelve_heads(tmp_path: Path) -> None:
    state = timm_model(embed_dim=384, num_heads=12, depth=1).state_dict()
    torch.save({"state_dict": {f"module.base_encoder.{name}": t for name, t in state.items()}}, tmp_path / "moco.pth")
    torch.save(state, tmp_path / "timm.pth")
    assert read_checkpoint(tmp_path / "moco.pth").info.num_heads == 12
    assert read_checkpoint(tmp_path / "timm.pth").info.num_heads == 6


def test_the_encoder_of_mae_alone_says_its_licence(tmp_path: Path) -> None:
    assert read_checkpoint(save_mae_encoder(tmp_path).path).info.license == "cc-by-nc-4.0"


def test_half_a_norm_is_no_encoder_without_one(tmp_path: Path) -> None:
    state = timm_model().state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"missing norm\.weight"):
        read_checkpoint(tmp_path / "half.pth")


def test_of_a_damaged_file_no_other_encoder_is_taken(tmp_path: Path) -> None:
    content = torch.load(save_moco(tmp_path).path, weights_only=True)
    del content["state_dict"]["module.base_encoder.cls_token"]
    torch.save(content, tmp_path / "moco.pth")
    with pytest.raises(CheckpointError, match="in a model without cls token, is 17, which is no square"):
        read_checkpoint(tmp_path / "moco.pth")


@pytest.mark.parametrize("shape", [(WIDTH,), (WIDTH, 3 * PATCH * PATCH)])
def test_a_projection_without_its_axes_is_refused_by_name(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = timm_model().state_dict() | {"patch_embed.proj.weight": torch.zeros(shape)}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.weight is .*, expected 4 axes"):
        read_checkpoint(tmp_path / "odd.pth")


def test_a_trained_layer_scale_is_not_left_out(tmp_path: Path) -> None:
    plain: dict[str, Any] = {
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    with pytest.raises(CheckpointError, match=r"no place for blocks\.\*\.ls1\.gamma"):
        load_backbone(VisionTransformer(**plain), save_deit3(tmp_path).path)
    write_safetensors(tmp_path / "one.safetensors", timm_with_layer_scale_of_one(), {})
    assert len(load_backbone(VisionTransformer(**plain), tmp_path / "one.safetensors").unexpected) == 2 * DEPTH


def timm_with_layer_scale_of_one() -> dict[str, Tensor]:
    state = timm_model(init_values=1.0, num_classes=0).state_dict()
    return {name: torch.ones_like(t) if name.endswith("gamma") else t for name, t in state.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("encoder.layer.1.attention.attention.key.bias"), r"bias of blocks\.1\.attn\.k is missing"),
        (lambda t: t.update({"encoder.layer.0.attention.q_norm.weight": torch.ones(WIDTH)}), r"besides those.*q_norm"),
    ],
)
def test_huggingface_layers_are_all_or_nothing(
    damage: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(**huggingface()), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    damage(tensors)
    write_safetensors(tmp_path / "model.safetensors", tensors, {})
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_another_activation_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_hf_vit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "quick_gelu"}))
    with pytest.raises(CheckpointError, match="hidden_act 'quick_gelu'"):
        read_checkpoint(tmp_path)


def test_a_huggingface_decoder_reconstructs(tmp_path: Path, images: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    save_hf_vitmae(tmp_path)
    model = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path).eval()
    model.config.mask_ratio = 0.75
    loaded = load_mae(tmp_path)
    assert loaded.info.decoder_num_heads == 4 and loaded.info.normalised_target is False
    noise = torch.rand(2, (SIZE // PATCH) ** 2, generator=torch.Generator().manual_seed(2))
    model.vit.embeddings.config.mask_ratio = 0.75
    with torch.no_grad():
        theirs, ours = model(images, noise=noise), loaded.model(images, noise, mask_ratio=0.75)
    torch.testing.assert_close(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.prediction, theirs.logits, rtol=0, atol=1e-4)


def test_the_preprocessor_beside_a_file_says_its_normalisation(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_hf_vit(tmp_path)
    assert read_checkpoint(tmp_path).info.mean == (0.5, 0.5, 0.5)
    assert not read_checkpoint(tmp_path).has_metadata
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.info.mean == (0.1, 0.2, 0.3) and checkpoint.info.std == (0.4, 0.5, 0.6)
    assert checkpoint.has_metadata
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_checkpoint(tmp_path)


def test_every_family_has_a_licence_or_none_and_a_name_of_its_own() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    licences = {family.name: family.license for family in FAMILIES}
    assert licences["mae"] == "cc-by-nc-4.0" and licences["vit"] == ""
