"""The segmentation backbone, step and inference: ours and MMSegmentation's own, from the same weights, in turns.

The peer is MMSegmentation's MAE, Feature2Pyramid, UPerHead and FCNHead in its EncoderDecoder, as its config for MAE on
ADE20K has them (batch normalisation in place of SyncBN, which no CPU runs), with its optimiser constructor and its
sliding windows. Its wrapper for mixed precision refuses a CPU, so there autocast is put around its step.
"""

from __future__ import annotations

import argparse
import importlib
import io
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from mae_transfer.benchmark import transfer
from mae_transfer.benchmark.transfer import Comparison, Forward, ForwardBackward, Run, check_same_maps
from mae_transfer.errors import RunFailed, require
from mae_transfer.sizes import get_size

PARTS = {
    "forward": "the backbone with its pyramid forward, without gradients",
    "forward-backward": "the backbone with its pyramid forward and backward",
    "encoder": "the encoder alone forward and backward",
    "step": "a whole training step of UperNet",
    "sliding": "sliding-window inference of one 4:3 image, windows as in the recipe",
    "memory": "peak memory of the backbone with its pyramid forward and backward",
}
_CLASSES = 150
_STEP_IMAGES = 2  # at least: batch normalisation of UPerHead's pooled branch needs two
_AGREEMENT = 1e-3  # of two images' logits, which are of order 1, in fp32


class _Pyramid(nn.Module):
    """A backbone and its neck, called as one."""

    def __init__(self, encoder: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.neck = neck

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = self.neck(self.encoder(images))
        return maps


class Setting(transfer.Setting):
    """BEiT's recipe for ADE20K at a size."""

    def imports(self) -> None:
        warnings.filterwarnings("ignore", module=r"mmcv|mmseg|torch")  # of theirs, at imports and in every step
        require("mmengine.logging", "segmentation").MMLogger.get_instance("benchmark", log_level="ERROR")
        importlib.import_module("mae_transfer.segmentation.recipe")

    def backbone(self, *, peer: bool) -> nn.Module:
        model = self.segmentor(peer=peer)
        return _Pyramid(model.get_submodule("backbone"), model.get_submodule("neck"))

    def segmentor(self, *, peer: bool) -> nn.Module:
        """UperNet: ours, or MMSegmentation's with the weights of ours."""
        torch.manual_seed(self.seed)
        segmentor = _built(self.config())
        for name, parameter in segmentor.named_parameters():
            if name.endswith("relative_position_bias_table"):  # zero to begin with
                nn.init.normal_(parameter, std=0.02)
        return mmseg_segmentor(segmentor, self) if peer else segmentor

    def photo(self) -> Tensor:
        """One normalised image (1, 3, H, W) whose shorter side is the window's."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(1, 3, self.image_size, self.image_size * 4 // 3, generator=generator)

    def batch(self) -> dict[str, Any]:
        """Noise and random labels, as MMSegmentation's loader gives them."""
        structures = require("mmseg.structures", "segmentation")
        pixel_data = require("mmengine.structures", "segmentation").PixelData
        generator = torch.Generator().manual_seed(self.seed)
        side = self.image_size
        inputs, samples = [], []
        for _ in range(max(self.batch_size, _STEP_IMAGES)):
            coarse = torch.randint(_CLASSES, (1, side // 32, side // 32), generator=generator)
            labels = coarse.repeat_interleave(32, dim=1).repeat_interleave(32, dim=2)
            sample = structures.SegDataSample(gt_sem_seg=pixel_data(data=labels))
            sample.set_metainfo({"img_shape": (side, side), "ori_shape": (side, side)})
            inputs.append(torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8))
            samples.append(sample)
        return {"inputs": inputs, "data_samples": samples}

    def config(self) -> Any:
        """Ours by the recipe: its ``model`` and ``optim_wrapper``."""
        recipe = importlib.import_module("mae_transfer.segmentation.recipe")
        settings = importlib.import_module("mae_transfer.segmentation.settings")
        checkpoint = importlib.import_module("mae_transfer.checkpoint")
        chosen = settings.read_settings(
            {
                "dataset": {"crop_size": self.image_size},
                "encoder": {"size": self.size},
                "head": {"norm": "bn"},
                "train": {"precision": self.precision, "batch_size": max(self.batch_size, _STEP_IMAGES)},
            }
        )
        facts = recipe.Facts(
            size=self.size,
            patch_size=get_size(self.size).patch_size,
            mean=checkpoint.IMAGENET_MEAN,
            std=checkpoint.IMAGENET_STD,
            classes=tuple(f"class {index}" for index in range(_CLASSES)),
        )
        return {"model": recipe.model(chosen, facts), **recipe.schedule(chosen, facts)}

    def optimizer(self, model: nn.Module, *, peer: bool) -> Any:
        """MMEngine's wrapper of AdamW with layer decay: by our constructor, or by MMSegmentation's."""
        wrapper = self.config()["optim_wrapper"]
        if peer:
            wrapper = {
                "type": "OptimWrapper",
                "optimizer": {key: wrapper["optimizer"][key] for key in ("type", "lr", "betas", "weight_decay")},
                "constructor": "LearningRateDecayOptimizerConstructor",
                "paramwise_cfg": {
                    "num_layers": get_size(self.size).depth,
                    "decay_rate": get_size(self.size).segmentation_layer_decay,
                    "decay_type": "layer_wise_vit",
                },
            }
        with _scope(), redirect_stdout(io.StringIO()):  # their constructor prints every parameter
            return require("mmengine.optim", "segmentation").build_optim_wrapper(model, wrapper)


def mmseg_segmentor(ours: nn.Module, setting: Setting) -> nn.Module:
    """MMSegmentation's EncoderDecoder as in its config for MAE on ADE20K, with the weights of ``ours``."""
    from mae_transfer.segmentation.release import our_name  # the framework, when it is needed

    numbers = get_size(setting.size)
    side = (setting.image_size, setting.image_size)
    config = setting.config()["model"]
    test = {key: config["test_cfg"][key] for key in ("mode", "crop_size", "stride")}
    peer = _built(
        {
            "model": {
                **config,
                "type": "EncoderDecoder",
                "backbone": {
                    "type": "MAE",
                    "img_size": side,
                    "patch_size": numbers.patch_size,
                    "embed_dims": numbers.width,
                    "num_layers": numbers.depth,
                    "num_heads": numbers.num_heads,
                    "init_values": 1.0,
                    "drop_path_rate": numbers.segmentation_drop_path,
                    "norm_cfg": {"type": "LN", "eps": 1e-6},
                    "out_indices": list(numbers.segmentation_taps),
                },
                "neck": {"type": "Feature2Pyramid", "embed_dim": numbers.width, "norm_cfg": {"type": "BN"}},
                "decode_head": {**config["decode_head"], "type": "UPerHead"},
                "test_cfg": test,
            }
        }
    )
    own = ours.state_dict()
    # Beside every table MMSegmentation keeps an index, which follows from the sizes.
    renamed = {name: our_name(name) for name in peer.state_dict() if not name.endswith("relative_position_index")}
    if differing := sorted(set(renamed.values()) ^ set(own)):
        raise RunFailed(f"weights of ours do not fit MMSegmentation's model: {differing}")
    peer.load_state_dict({name: own[our] for name, our in renamed.items()}, strict=False)
    return peer


class Encoder(ForwardBackward):
    def set_up(self) -> None:
        super().set_up()
        self.backbone = self.backbone.encoder


class TrainingStep(Run):
    def set_up(self) -> None:
        self.model = self.setting.segmentor(peer=self.peer)
        self.model.train()
        self.optimizer = self.setting.optimizer(self.model, peer=self.peer)
        self.batch = self.setting.batch()

    def turn(self) -> None:
        with self.setting.autocast():
            data = self.model.data_preprocessor(self.batch, True)
            losses = self.model(**data, mode="loss")
        total, _ = self.model.parse_losses(losses)
        self.optimizer.update_params(total)


class Sliding(Run):
    def set_up(self) -> None:
        self.model = self.setting.segmentor(peer=self.peer).train(False)
        self.photo = self.setting.photo()
        shape = tuple(self.photo.shape[2:])
        self.metas = [{"ori_shape": shape, "img_shape": shape}]

    def turn(self) -> None:
        with torch.no_grad(), self.setting.autocast():
            self.logits = self.model.inference(self.photo, [dict(meta) for meta in self.metas])


def check_same(setting: Setting) -> None:
    """Raises RunFailed unless both give the same maps of two images, and the same logits by sliding windows."""
    check_same_maps(setting, torch.randn(2, 3, setting.image_size, setting.image_size), "MMSegmentation")
    logits = []
    for name in ("ours", "mmseg"):
        run = Sliding(name, setting)
        run.set_up()
        run.turn()
        logits.append(run.logits)
    worst = (logits[0] - logits[1]).abs().max().item()
    if not worst <= _AGREEMENT:
        raise RunFailed(f"logits of ours and of MMSegmentation differ by {worst:.6f}: not the same computation")


def _built(config: dict[str, Any]) -> nn.Module:
    config = require("mmengine.config", "segmentation").ConfigDict(config)  # heads and segmentors read attributes
    with _scope():
        model: nn.Module = require("mmseg.registry", "segmentation").MODELS.build(config["model"])
    return model


def _scope() -> Any:
    """MMSegmentation's registries, ours among them."""
    importlib.import_module("mae_transfer.segmentation")
    return require("mmengine.registry", "segmentation").DefaultScope.overwrite_default_scope("mmseg")


RUNS: dict[str, type[Run]] = {
    "forward": Forward,
    "forward-backward": ForwardBackward,
    "encoder": Encoder,
    "step": TrainingStep,
    "sliding": Sliding,
    "memory": ForwardBackward,
}

COMPARISON = Comparison(
    peer="mmseg",
    setting=Setting,
    parts=PARTS,
    runs=RUNS,
    default=("forward-backward", "step", "sliding", "memory"),
    single=("sliding",),
    check=lambda size: check_same(Setting(size=size, image_size=64)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``tools/benchmark.py segmentation`` accepts."""
    transfer.add_arguments(parser, COMPARISON)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for counts below 1 and sizes without MMSegmentation's counterpart."""
    return transfer.run(arguments, COMPARISON)
