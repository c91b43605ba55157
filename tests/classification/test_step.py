"""Training steps against a plain loop of timm's model, groups and schedule with torch's AdamW; encoders of other
families; compiled blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler

from mae_transfer import build_vit
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.classification.augment import finish_batch
from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.classification.sections import LogConfig, OptimSection, TrainConfig
from mae_transfer.engine.checkpoints import CheckpointConfig
from mae_transfer.engine.config import read_config
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.errors import ConfigError
from tests.classification.small import PATCH, SIZE, small_config

ALONE = Processes(device=torch.device("cpu"))


def trained_run(config: ClassificationConfig, folder: Path) -> ClassificationRun:
    """``config`` trained to its end, without evaluation."""
    run, place = ClassificationRun(config, ALONE), RunFolder(folder)
    place.checkpoints.mkdir(parents=True)
    run.trainer(place).run()
    return run


def config_of(classes: Path, optim: OptimSection, *, compiled: bool = False) -> ClassificationConfig:
    config = small_config(classes / "train", str(classes / "val"), optim=optim)
    return replace(
        config,
        model=replace(config.model, drop_path=0.0),
        train=TrainConfig(steps=6, batch_size=8, precision="fp32", compile=compiled),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(tensorboard=False, peak_gflops=1.0),
    )


def test_fine_tuning_is_a_plain_loop_of_timms(classes: Path, tmp_path: Path) -> None:
    """The same weights after six steps of the paper's recipe: mixup, cutmix, erasing, layer decay, warm-up, cosine."""
    config = config_of(classes, OptimSection(base_lr=0.02, warmup_epochs=2 / 3))  # a warm-up of two steps
    run = ClassificationRun(config, ALONE)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, embed_dim=32, depth=2, num_heads=2, num_classes=4,
        global_pool="avg", fc_norm=True,
    )  # fmt: skip
    model.load_state_dict(run.model.state_dict())
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.75, no_weight_decay_list=model.no_weight_decay()
    )
    peak = 0.02 * 8 / 256
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), fused=False, foreach=False)
    schedule = CosineLRScheduler(
        optimizer, t_initial=4, lr_min=1e-6, warmup_t=2, warmup_lr_init=0, warmup_prefix=True, t_in_epochs=False
    )
    dataset, sampler = run._make_dataset(), run.step_sampler(0)
    for step in range(6):
        schedule.step_update(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule._get_lr(step)[0] * group["lr_scale"]
        batch = dataset.__getitems__(sampler.global_batch(step))
        augment = config.augmentation
        images, targets = finish_batch(batch, config=augment, mean=run.mean, std=run.std, num_classes=4)
        loss = -(targets * model.train()(images).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = trained_run(config, tmp_path / "run").model.state_dict()
    start = run.model.state_dict()
    for name, theirs in model.state_dict().items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-3, atol=2e-5)
    assert (ours["head.weight"] - start["head.weight"]).abs().max() > 1e-3


OTHERS: dict[str, dict[str, Any]] = {
    "registers, layer scale, gated MLP": {"num_registers": 2, "layer_scale": 1e-5, "ffn": "swiglu"},
    "rotary positions": {"absolute_positions": False, "rope_base": 100.0, "norm_eps": 1e-5},
    "relative tables, no norm": {"absolute_positions": False, "relative_position": "bias", "final_norm": False},
    "windows, no cls token": {"cls_token": False, "window_size": 2, "global_blocks": (1,)},
}


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_encoders_of_other_families(protocol: str, options: dict[str, Any], classes: Path, tmp_path: Path) -> None:
    """The architecture is the checkpoint's; what the head sees is the encoder's own output, pooled."""
    torch.manual_seed(0)
    vit = build_vit(size="tiny", width=32, depth=2, num_heads=2, patch_size=8, image_size=32, **options)
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit).to_metadata())
    places = [f"data.train={classes / 'train'}", f"data.val={classes / 'val'}", "data.image_size=32"]
    more = ["train.steps=2", "train.batch_size=8", "optim.warmup_epochs=0", "data.scan_cache=false"]
    config = read_config(
        ClassificationConfig, None, [f"protocol={protocol}", f"init_checkpoint={path}", *places, *more]
    )
    run = ClassificationRun(config, ALONE)
    assert run.config.resolved() == run.config
    model, images = run.model.eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        x, grid = vit.embed(images)
        tokens = vit.run_blocks(x, grid)
        if protocol == "linear":
            tokens = vit.norm(tokens)
            cls = vit.cls_token is not None
            expected = tokens[:, 0] if cls else tokens.mean(1)
            assert model.pool == ("cls" if cls else "mean")
        else:
            expected = torch.nn.functional.layer_norm(
                tokens[:, vit.num_prefix_tokens :].mean(1), (32,), eps=vit.norm_eps
            )
        torch.testing.assert_close(model.encode(images), expected, rtol=1e-5, atol=1e-5)


def test_architecture_by_hand() -> None:
    config = read_config(ClassificationConfig, None, ["model.size=tiny", "model.architecture.layer_scale=1.0e-5"])
    assert config.resolved().encoder_arguments["layer_scale"] == 1e-5
    with pytest.raises(ConfigError, match=r"did you mean model\.architecture\.layer_scale\?"):
        read_config(ClassificationConfig, None, ["model.architecture.layerscale=1"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself, and here warnings are errors
def test_compiled_blocks_train_alike(classes: Path, tmp_path: Path) -> None:
    optim = OptimSection(base_lr=0.02, warmup_epochs=0)
    plain = trained_run(config_of(classes, optim), tmp_path / "plain").model.state_dict()
    compiled = trained_run(config_of(classes, optim, compiled=True), tmp_path / "compiled").model.state_dict()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)
