"""Settings resolve before the config is built; shipped configs build; wrong keys are named."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS

from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.errors import ConfigError, DataError
from mae_transfer.segmentation import MAELinearHead
from mae_transfer.segmentation.config import derive, load_config
from mae_transfer.segmentation.recipe import Facts
from mae_transfer.segmentation.release import our_name
from mae_transfer.segmentation.settings import read_settings
from mae_transfer.vit import build_vit
from pretrain import build_mae

MMSEG = Path(mmseg.__file__).parent / ".mim" / "configs"  # the configs that MMSegmentation ships
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "segmentation"
TINY = CONFIGS / "upernet_tiny.py"


def shipped() -> list[str]:
    return sorted(path.name for path in CONFIGS.glob("*.py"))


def load(folder: Path, path: Path = TINY, **options) -> Config:
    given = {key.replace("__", "."): value for key, value in options.items()}
    return load_config(path, {"dataset.root": str(folder), "dataset.reduce_zero_label": False, **given}, work_dir="run")


@pytest.mark.parametrize("name", [name for name in shipped() if "_ms" not in name and "_scratch" not in name])
def test_every_model_builds_and_runs_on_the_meta_device(name: str, make_folder) -> None:
    """Of configs with a model of their own."""
    named = Config.fromfile(CONFIGS / name).dataset.get("name")
    config = load_config(CONFIGS / name, work_dir="run") if named else load(make_folder(), CONFIGS / name)
    with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
        model = MODELS.build(config.model)
    crop = config.model.backbone.image_size
    stride = 4 if config.model.neck else config.model.backbone.patch_size
    with torch.no_grad():
        logits = model._forward(torch.zeros(2, 3, *crop, device="meta"))
    assert logits.shape == (2, len(config.facts.classes), crop[0] // stride, crop[1] // stride)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build(config: Config) -> torch.nn.Module:
    with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
        return MODELS.build(config.model)


# Width, depth, heads and taps of the sizes, as published (MAE; taps of B and L: BEiT).
ARCHITECTURES = {
    "b": (768, 12, 12, (3, 5, 7, 11)),
    "l": (1024, 24, 16, (7, 11, 15, 23)),
    "h": (1280, 32, 16, (9, 14, 19, 31)),
}


@pytest.mark.parametrize("size", ARCHITECTURES)
def test_parameters_are_those_of_mmsegmentations_own_config(size: str, make_folder, monkeypatch) -> None:
    """Name by name and shape by shape, against the model of MMSegmentation's config for MAE on ADE20K."""
    linspace = torch.linspace  # MMSegmentation reads drop-path rates off it, which the meta device does not hold
    monkeypatch.setattr(torch, "linspace", lambda *args: linspace(*args, device="cpu"))
    width, depth, heads, taps = ARCHITECTURES[size]
    theirs = Config.fromfile(MMSEG / "mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py")
    theirs.model.pretrained = None
    theirs.model.backbone.update(embed_dims=width, num_layers=depth, num_heads=heads, out_indices=list(taps))
    theirs.model.neck.embed_dim = width
    theirs.model.decode_head.update(in_channels=[width] * 4, channels=width, num_classes=4)
    theirs.model.auxiliary_head.update(in_channels=width, num_classes=4)
    config = load(make_folder(), CONFIGS / f"upernet_{size}_512_160k.py")
    expected = {
        our_name(name): shape
        for name, shape in shapes(build(theirs)).items()
        if not name.endswith("relative_position_index")
    }
    assert shapes(build(config)) == expected
    assert tuple(config.model.backbone.taps) == taps
    assert config.model.decode_head.dropout_ratio == theirs.model.decode_head.dropout_ratio
    assert config.model.auxiliary_head.in_index == theirs.model.auxiliary_head.in_index


@pytest.mark.parametrize(("size", "width", "depth"), [("b", 768, 12), ("l", 1024, 24)])
def test_the_modern_variant_is_the_published_encoder_under_vitdets_pyramid(size, width, depth, make_folder) -> None:
    config = load(make_folder(), CONFIGS / f"upernet_{size}_sfp_512_160k.py")
    model = build(config)
    encoder = {name for name in shapes(model) if name.startswith("backbone.")}
    with torch.device("meta"):
        published = build_mae({"b": "mae_vit_base_patch16", "l": "mae_vit_large_patch16"}[size]).state_dict()
    assert encoder == {
        f"backbone.{name}" for name in published if not name.startswith(("decoder", "mask_token", "norm."))
    }
    assert tuple(config.model.backbone.taps) == (depth - 1,)
    neck = shapes(model.neck)
    # ViTDet's SimpleFeaturePyramid: transposed convolutions, then 1x1 and 3x3 convolutions to 256 channels.
    assert neck["simfp_2.0.weight"] == (width, width // 2, 2, 2)
    assert neck["simfp_2.3.weight"] == (width // 2, width // 4, 2, 2)
    assert neck["simfp_2.4.weight"] == (256, width // 4, 1, 1)
    assert neck["simfp_5.2.weight"] == (256, 256, 3, 3)
    assert neck["simfp_4.0.norm.weight"] == (256,)
    assert list(config.model.decode_head.in_channels) == [256] * 4
    assert config.model.decode_head.channels == width


@pytest.mark.parametrize(("size", "width", "depth"), [("b", 768, 12), ("l", 1024, 24)])
def test_probing_heads_read_the_last_block_of_a_frozen_encoder(size, width, depth, make_folder) -> None:
    folder = make_folder()
    linear, fcn = (load(folder, CONFIGS / f"{kind}_{size}_512_40k.py") for kind in ("linear", "fcn"))
    for config in (linear, fcn):
        assert tuple(config.model.backbone.taps) == (depth - 1,)
        assert config.model.backbone.frozen is True
        assert config.model.neck is None and config.model.auxiliary_head is None
    head = dict(build(linear).decode_head.named_parameters())
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "conv_seg.weight": (4, width, 1, 1),
        "conv_seg.bias": (4,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    convolutions = [module for module in build(fcn).decode_head.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [(conv.out_channels, conv.kernel_size) for conv in convolutions if conv.out_channels != 4] == [
        (width, (3, 3))
    ] * 2


def test_the_linear_head_is_a_norm_and_a_linear_map() -> None:
    """Against a batch norm and a matrix product over the pixels, written out."""
    torch.manual_seed(0)
    head = MAELinearHead(6, num_classes=3, norm_cfg={"type": "BN"}, in_index=0, dropout_ratio=0.0)
    x = 5 + 3 * torch.randn(2, 6, 4, 5)
    normalised = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    weight, bias = head.conv_seg.weight[:, :, 0, 0], head.conv_seg.bias
    expected = torch.einsum("kc,nchw->nkhw", weight, normalised) + bias[:, None, None]
    torch.testing.assert_close(head([x]), expected)


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_multi_scale_configs_differ_by_the_test_alone(size: str, make_folder) -> None:
    folder = make_folder()
    single, multi = (load(folder, CONFIGS / f"upernet_{size}_512_160k{end}.py") for end in ("", "_ms"))
    assert (single.settings.test.tta, multi.settings.test.tta) == (False, True)
    assert tuple(multi.settings.test.scales) == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    scales = [step["scale_factor"] for step in multi.tta_pipeline[-1]["transforms"][0]]
    assert tuple(scales) == tuple(multi.settings.test.scales)
    kinds = [step["type"] for step in multi.tta_pipeline]
    assert kinds.index("Resize") < kinds.index("TestTimeAug")  # scales are of the resized image
    for config in (single, multi):
        del config.settings["test"]["tta"]
    assert single.to_dict() == multi.to_dict()


def test_huge_brings_its_patches_to_whole_crops(make_folder, tmp_path) -> None:
    encoder = build_vit("tiny", patch_size=14, image_size=28)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, encoder.state_dict(), describe(encoder).to_metadata())
    folder = make_folder()
    huge = CONFIGS / "upernet_h_512_160k.py"
    config = load(folder, huge, init_checkpoint=str(path), encoder__size="tiny")
    assert (config.model.backbone.patch_size, tuple(config.model.backbone.image_size)) == (16, (512, 512))
    with DefaultScope.overwrite_default_scope("mmseg"):
        backbone = MODELS.build({**config.model.backbone, "image_size": (64, 64)})
    backbone.init_weights()
    assert backbone.patch_embed.proj.weight.shape == (192, 3, 16, 16)
    # Resampling keeps what a patch of one colour gives.
    ours, theirs = (net.patch_embed.proj.weight.sum((2, 3)) for net in (backbone, encoder))
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9


def test_from_scratch_nothing_is_protected(make_folder) -> None:
    for size in ("b", "l"):
        config = load(make_folder(size), CONFIGS / f"upernet_{size}_512_160k_scratch.py")
        assert config.optim_wrapper.paramwise_cfg.decay_rate == 1.0
        assert config.model.backbone.init_checkpoint is None


@pytest.mark.parametrize(
    ("name", "theirs", "num_classes"),
    [
        ("upernet_b_512_160k", "ade20k", 150),
        ("upernet_b_cityscapes_512x1024_80k", "cityscapes", 19),
        ("upernet_b_voc2012_512_40k", "pascal_voc12", 21),
        ("upernet_b_voc2012_aug_512_40k", "pascal_voc12_aug", 21),
        ("upernet_b_pascal_context_480_80k", "pascal_context", 60),
        ("upernet_b_pascal_context_59_480_80k", "pascal_context_59", 59),
        ("upernet_b_coco_stuff164k_512_160k", "coco-stuff164k", 171),
        ("upernet_b_coco_stuff10k_512_40k", "coco-stuff10k", 171),
    ],
)
def test_published_data_sets_have_mmsegmentations_sizes(name: str, theirs: str, num_classes: int) -> None:
    """Crops, image sizes, labels and root against MMSegmentation's own data configs; nothing is read from disk."""
    expected = Config.fromfile(MMSEG / f"_base_/datasets/{theirs}.py")
    config = load_config(CONFIGS / f"{name}.py", work_dir="run")
    ours, reference = config.test_dataloader.dataset, expected.test_dataloader.dataset
    assert len(config.facts.classes) == num_classes == config.model.decode_head.num_classes
    assert ours.root == reference.data_root.rstrip("/")
    crop = next(step["crop_size"] for step in expected.train_pipeline if step["type"] == "RandomCrop")
    assert tuple(config.model.data_preprocessor.size) == tuple(crop)
    scale = next(step["scale"] for step in expected.test_pipeline if step["type"] == "Resize")
    assert tuple(next(step["scale"] for step in ours.pipeline if step["type"] == "Resize")) == tuple(scale)
    with DefaultScope.overwrite_default_scope("mmseg"):
        kind = DATASETS.get(reference["type"])
    assert tuple(config.facts.classes) == tuple(kind.METAINFO["classes"])
    assert [tuple(colour) for colour in config.facts.palette] == [tuple(c) for c in kind.METAINFO["palette"]]
    own = inspect.signature(kind).parameters.get("reduce_zero_label")
    assert ours.reduce_zero_label is reference.get("reduce_zero_label", own.default if own else False)


def test_upernet_b_is_beits_recipe(make_folder) -> None:
    """The numbers of the recipe as published, whole."""
    config = load(make_folder(), CONFIGS / "upernet_b_512_160k.py")
    backbone, head, auxiliary = config.model.backbone, config.model.decode_head, config.model.auxiliary_head
    assert (backbone.size, backbone.patch_size, tuple(backbone.image_size)) == ("base", 16, (512, 512))
    assert (tuple(backbone.taps), backbone.drop_path, backbone.layer_scale) == ((3, 5, 7, 11), 0.1, 1.0)
    assert backbone.relative_position == "bias"
    assert (head.channels, tuple(head.in_channels), tuple(head.pool_scales)) == (768, (768,) * 4, (1, 2, 3, 6))
    assert (head.dropout_ratio, head.align_corners) == (0.1, False)
    assert (auxiliary.in_index, auxiliary.channels, auxiliary.num_convs) == (2, 256, 1)
    assert auxiliary.loss_decode.loss_weight == 0.4
    assert (tuple(config.model.test_cfg.crop_size), tuple(config.model.test_cfg.stride)) == ((512, 512), (341, 341))
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, tuple(optimizer.betas), optimizer.weight_decay) == (
        "AdamW",
        1e-4,
        (0.9, 0.999),
        0.05,
    )
    assert config.optim_wrapper.paramwise_cfg.decay_rate == 0.65
    rise, decline = config.param_scheduler
    assert (rise.start_factor, rise.end) == (1e-6, 1500)
    assert (decline.power, decline.eta_min, decline.begin, decline.end) == (1.0, 0.0, 1500, 160_000)
    assert config.train_cfg.max_iters == 160_000
    assert config.train_dataloader.batch_size == 16
    steps = {step["type"]: step for step in config.train_dataloader.dataset.pipeline}
    assert tuple(steps["RandomResize"]["scale"]) == (2048, 512)
    assert tuple(steps["RandomResize"]["ratio_range"]) == (0.5, 2.0)
    assert steps["RandomCrop"]["cat_max_ratio"] == 0.75


def test_large_differs_by_its_size_alone(make_folder) -> None:
    config = load(make_folder(), CONFIGS / "upernet_l_512_160k.py")
    assert tuple(config.model.backbone.taps) == (7, 11, 15, 23)
    assert config.model.backbone.drop_path == 0.2
    assert config.model.decode_head.channels == 1024


def test_everything_follows_from_one_setting(make_folder) -> None:
    config = load(
        make_folder(),
        dataset__crop_size=96,
        train__max_iters=70,
        train__batch_size=6,
        train__seed=3,
        dataset__workers=0,
    )
    assert tuple(config.model.data_preprocessor.size) == (96, 96)
    assert tuple(config.model.backbone.image_size) == (96, 96)
    assert tuple(config.model.test_cfg.crop_size) == (96, 96)
    assert tuple(config.model.test_cfg.stride) == (64, 64)
    steps = {step["type"]: step for step in config.train_dataloader.dataset.pipeline}
    assert tuple(steps["RandomCrop"]["crop_size"]) == (96, 96)
    assert tuple(steps["RandomResize"]["scale"]) == (384, 96)
    test_steps = {step["type"]: step for step in config.test_dataloader.dataset.pipeline}
    assert tuple(test_steps["Resize"]["scale"]) == (384, 96)
    assert config.model.decode_head.num_classes == config.model.auxiliary_head.num_classes == 4
    assert config.train_dataloader.dataset.classes == ["ground", "red", "green", "blue"]
    assert config.train_dataloader.dataset.reduce_zero_label is config.val_dataloader.dataset.reduce_zero_label is False
    assert config.param_scheduler[-1].end == config.train_cfg.max_iters == 70
    assert config.param_scheduler[0].end == config.param_scheduler[1].begin == 7
    assert config.train_dataloader.batch_size == 6
    assert config.randomness.seed == 3


def test_learning_rate_rises_and_ends_at_zero(make_folder) -> None:
    from mmengine.optim import LinearLR, PolyLR

    config = load(make_folder(), train__max_iters=40, train__lr=1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    kinds = {"LinearLR": LinearLR, "PolyLR": PolyLR}
    schedulers = [
        kinds[entry["type"]](optimizer, **{key: value for key, value in entry.items() if key != "type"})
        for entry in config.param_scheduler
    ]
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(1e-9)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[3] == max(rates)
    assert rates[-1] == pytest.approx(0)
    assert rates[-2] == pytest.approx(1e-3 / 35)


def test_batch_is_over_all_processes(make_folder) -> None:
    folder = make_folder()
    options = {"dataset.root": str(folder), "train.batch_size": 6}
    assert load_config(TINY, options, work_dir="run", num_processes=3).train_dataloader.batch_size == 2
    with pytest.raises(ConfigError, match="shared evenly by 4"):
        load_config(TINY, options, work_dir="run", num_processes=4)


def test_a_checkpoints_patch_wins_over_the_files_and_loses_to_the_command_lines(make_folder, tmp_path) -> None:
    encoder = build_vit("tiny", patch_size=16, image_size=32)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, encoder.state_dict(), describe(encoder).to_metadata())
    folder = make_folder()
    assert load(folder, init_checkpoint=str(path)).model.backbone.patch_size == 16
    assert load(folder, init_checkpoint=str(path), encoder__patch_size=8).model.backbone.patch_size == 8
    assert load(folder).model.backbone.patch_size == 8


def test_normalisation_and_patch_come_from_the_checkpoint(make_folder, tmp_path) -> None:
    encoder = build_vit("small", patch_size=8, image_size=32)
    path = tmp_path / "encoder.safetensors"
    info = describe(encoder, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    write_safetensors(path, encoder.state_dict(), info.to_metadata())
    config = load(make_folder(), init_checkpoint=str(path), encoder__size=None)
    preprocessor = config.model.data_preprocessor
    assert list(preprocessor.mean) == pytest.approx([25.5, 51.0, 76.5])
    assert list(preprocessor.std) == pytest.approx([102.0, 127.5, 153.0])
    assert preprocessor.bgr_to_rgb is True
    assert (config.model.backbone.size, config.model.backbone.patch_size) == ("small", 8)
    assert config.model.backbone.init_checkpoint == str(path)
    assert config.model.decode_head.in_channels == [384] * 4


@pytest.mark.parametrize(("amp", "given", "expected"), [(True, "fp32", "bf16"), (False, "fp32", "fp32")])
def test_amp_flag_and_precision(make_folder, amp: bool, given: str, expected: str) -> None:
    options = {"dataset.root": str(make_folder()), "train.precision": given}
    config = load_config(TINY, options, work_dir="run", amp=amp)
    assert config.optim_wrapper.type == {"bf16": "MAEAmpOptimWrapper", "fp32": "MAEOptimWrapper"}[expected]
    assert config.model.test_cfg.precision == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.max_iter", 10, "unknown key train.max_iter; did you mean train.max_iters"),
        ("dataset.rot", "x", "did you mean dataset.root"),
        ("init_checkpoin", "x", "did you mean init_checkpoint"),
        ("model.decode_head.dropout_rate", 0.0, "did you mean model.decode_head.dropout_ratio"),
        ("train_dataloader.num_worker", 0, "did you mean train_dataloader.num_workers"),
        ("train.max_iters", "many", "a whole number"),
        ("train.max_iters", True, "a whole number"),
        ("train.max_iters", 0, "at least 1"),
        ("train.keep_checkpoints", 1, "at least 2"),
        ("train.precision", "fp8", "fp32, bf16, fp16"),
        ("train.precision", "fp16", "CUDA"),
        ("train.warmup_iters", 1, "expected 0, or 2"),
        ("train.warmup_iters", 600, "expected 0, or 2 to 599"),
        ("dataset.crop_size", 100, "multiples of 8, such as 96 or 104"),
        ("dataset.crop_size", "a,b", "2 numbers"),
        ("train.batch_size", 1, "head.norm=gn"),
        ("encoder.size", "hug", "expected one of tiny"),
        ("test.stride", 500, "gaps"),
        ("head.kind", "uper", "expected one of upernet, fcn, linear"),
        ("head.kind", "linear", "head.channels has no meaning"),
        ("head.kind", "fcn", "head.aux_weight is 0.4; only head.kind=upernet"),
        ("encoder.pyramid", "none", "head.kind=upernet expects four_tap or simple"),
        ("encoder.pyramid_norm", "in", "expected one of None, bn"),
        ("dataset.classes", "none.txt", "does not exist"),
    ],
)
def test_wrong_keys_and_values_are_named(make_folder, key: str, value: object, message: str) -> None:
    folder = make_folder()
    with pytest.raises((ConfigError, DataError), match=message):
        load_config(TINY, {"dataset.root": str(folder), key: value}, work_dir="run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is possible here")
def test_single_image_batches_train_with_group_norm(make_folder) -> None:
    config = load(make_folder(), train__batch_size=1, head__norm="gn")
    assert config.model.decode_head.norm_cfg.type == "GN"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian = {}", "unknown key trian; did you mean train"),
        ("train = {'epochs': 3}", "unknown key train.epochs"),
        ("train = 3", "expected its settings"),
        ("_base_ = './nowhere.py'", "nowhere.py"),
        ("train = {", "SyntaxError"),
    ],
)
def test_wrong_config_files_are_named(make_folder, tmp_path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(make_folder(), path)


def test_missing_config_file() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("nowhere.py", work_dir="run")


def test_framework_keys_of_files_and_options_win(make_folder, tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"_base_ = {str(TINY)!r}\nmodel = {{'decode_head': {{'dropout_ratio': 0.3}}}}\n")
    config = load(make_folder(), path, optim_wrapper__clip_grad__max_norm=1.0, train_dataloader__num_workers=0)
    assert config.model.decode_head.dropout_ratio == 0.3
    assert config.model.decode_head.num_classes == 4
    assert config.optim_wrapper.clip_grad.max_norm == 1.0
    assert config.train_dataloader.num_workers == 0


def test_a_dumped_config_reads_back_the_same(make_folder, tmp_path) -> None:
    folder = make_folder()
    config = load(folder, train__max_iters=70, model__decode_head__dropout_ratio=0.2)
    path = tmp_path / "dumped.py"
    config.dump(path)
    again = load_config(path, work_dir="run")
    assert again.to_dict() == config.to_dict()
    # A setting still moves what follows from it, and what was laid over stays.
    moved = load_config(path, {"dataset.crop_size": 64}, work_dir="run")
    assert tuple(moved.model.test_cfg.stride) == (42, 42)
    assert moved.model.decode_head.dropout_ratio == 0.2


def test_a_dumped_config_needs_neither_encoder_nor_data_to_predict(make_folder, tmp_path) -> None:
    encoder = build_vit("tiny", patch_size=8, image_size=32)
    source = tmp_path / "encoder.safetensors"
    write_safetensors(source, encoder.state_dict(), describe(encoder, mean=(0.1, 0.2, 0.3)).to_metadata())
    folder = make_folder()
    config = load(folder, init_checkpoint=str(source))
    path = tmp_path / "dumped.py"
    config.dump(path)
    source.unlink()
    folder.rename(tmp_path / "elsewhere")
    again = load_config(path, work_dir="run", for_training=False)
    assert again.model.data_preprocessor.to_dict() == config.model.data_preprocessor.to_dict()
    assert again.facts.to_dict() == config.facts.to_dict()


def test_huge_builds_with_whole_maps(tiny_facts: Facts) -> None:
    facts = replace(tiny_facts, size="huge", patch_size=14)
    with pytest.raises(ConfigError, match="multiples of 112, such as 448 or 560"):
        derive(read_settings({"dataset": {"crop_size": 512}}), facts, "run")
    config = derive(read_settings({"dataset": {"crop_size": 448}}), facts, "run")
    with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
        model = MODELS.build(config.model)
    with torch.no_grad():
        assert model._forward(torch.zeros(2, 3, 448, 448, device="meta")).shape == (2, 4, 112, 112)
