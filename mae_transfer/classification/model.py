"""A classifier on the one encoder, with the keys of the released fine-tuned and linear-probe checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mae_transfer.checkpoint import EncoderInfo, Report, load_checkpoint, read_checkpoint, vit_arguments
from mae_transfer.checkpoint.read import read_tensors
from mae_transfer.engine.run_folder import weights_file
from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.vit import VisionTransformer

_FINETUNE_STD, _PROBE_STD = 2e-5, 0.01  # of the head's first weights, as the released code draws them


class FeatureNorm(nn.BatchNorm1d):
    """Batch normalisation without affine parameters, over the batch of all processes (paper, Appendix A.1).

    It stands on frozen features, so no gradient goes through its statistics.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        features = features.float()
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(features)
        assert not features.requires_grad
        count = torch.tensor(float(len(features)), device=features.device)
        dist.all_reduce(count)
        mean = features.sum(0) / count
        dist.all_reduce(mean)
        square = (features - mean).square().sum(0)
        dist.all_reduce(square)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(square / (count - 1), momentum)
        self.num_batches_tracked += 1
        return (features - mean) / (square / count + self.eps).sqrt()


class Classifier(VisionTransformer):
    """The encoder, pooled, and a linear layer.

    Keys besides the encoder's: ``fc_norm.*``, the norm of the averaged patch tokens, which takes the place of ``norm``
    as in the released fine-tuning code; ``head.*``. With ``probe`` the encoder keeps the norm that it has: ``norm``
    whatever is pooled, or the ``fc_norm`` of one that was fine-tuned with it; ``head`` is ``FeatureNorm`` and the layer
    (``head.0``, ``head.1``), as in the released linear probe.

    Args:
        pool: "mean" of the patch tokens, or the "cls" token.
        probe: built to be trained on an encoder that stays as it is.
        pooled_norm: of a probe: the encoder has ``fc_norm``.
        encoder: what ``VisionTransformer`` takes.
    """

    def __init__(
        self, *, num_classes: int, pool: str = "mean", probe: bool = False, pooled_norm: bool = False, **encoder: Any
    ) -> None:
        norm = encoder.pop("final_norm", True)  # some families have none; what a probe is put on stays as it is
        super().__init__(final_norm=norm if probe else pool == "cls", **encoder)
        self.num_classes = num_classes
        self.pool = pool
        self.probe = probe
        averaged = pool == "mean" and (pooled_norm or not probe)
        self.fc_norm = nn.LayerNorm(self.width, eps=self.norm_eps) if averaged else nn.Identity()
        linear = nn.Linear(self.width, num_classes)
        nn.init.trunc_normal_(linear.weight, std=_PROBE_STD if probe else _FINETUNE_STD)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(FeatureNorm(self.width), linear) if probe else linear
        # So many first blocks, and the embeddings, run without gradient; None where all of the encoder trains.
        self.frozen_blocks: int | None = None

    def train_last(self, blocks: float) -> None:
        """Freeze the encoder but for its last ``blocks`` blocks; half a block is its MLP with its norm (paper, Section
        4.3). The head trains always, and so does ``fc_norm``, which no pretraining has, but for a probe's; ``norm`` if
        a block does.

        Raises:
            ConfigError: more blocks than there are.
        """
        if blocks > self.depth:
            raise ConfigError(f"partial.blocks={blocks:g}: the encoder has {self.depth} blocks; give at most as many")
        whole, half = int(blocks), blocks != int(blocks)
        first = self.depth - whole  # block that trains whole
        self.frozen_blocks = first - 1 if half else first
        for name, parameter in self.named_parameters():
            block = int(name.split(".")[1]) if name.startswith("blocks.") else None
            if block is not None:
                part = name.split(".")[2]
                trains = block >= first or (half and block == first - 1 and part in ("norm2", "mlp", "ls2"))
            else:
                of_the_encoder = name.startswith("norm.") or (self.probe and name.startswith("fc_norm."))
                trains = blocks > 0 if of_the_encoder else name.startswith(("head.", "fc_norm."))
            parameter.requires_grad_(trains)

    def train(self, mode: bool = True) -> Classifier:
        """As ``nn.Module.train``; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.frozen_blocks is not None:
            frozen = [self.patch_embed, *list(self.blocks)[: self.frozen_blocks]]
            for part in frozen if self.frozen_blocks < self.depth else [*frozen, self.norm, self.fc_norm]:
                part.eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D): what the head sees, the cls token or the mean of the patch tokens, normed.

        Embeddings and blocks that are frozen keep nothing for a backward pass.
        """
        grad, frozen = torch.is_grad_enabled(), self.frozen_blocks
        with torch.set_grad_enabled(grad and frozen is None):
            x, grid = self.embed(images)  # (N, T, D), tokens of no place first
            x = self.run_blocks(x, grid, stop=frozen or 0)
        x = self.norm(self.run_blocks(x, grid, start=frozen or 0))
        if self.pool == "cls":
            return x[:, 0]
        return self.fc_norm(x[:, self.num_prefix_tokens :].mean(dim=1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (N, C, H, W), or their features (N, D) as ``encode`` gives them, -> logits (N, classes)."""
        return self.head(self.encode(inputs) if inputs.ndim == 4 else inputs)


def load_encoder(model: Classifier, path: str | Path) -> Report:
    """Start from the encoder of any supported checkpoint, strictly (``load_backbone``). A head that the file has was
    trained for other classes and is left out.

    Raises:
        CheckpointError: unreadable, or another architecture. The model is left untouched.
    """
    checkpoint = read_checkpoint(path)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("head.")}
    return load_checkpoint(model, replace(checkpoint, tensors=tensors))


@dataclass(frozen=True, kw_only=True)
class LoadedClassifier:
    """A trained classifier in evaluation mode and what its file says of it.

    Attributes:
        classes: their names in the order of the logits; None where the file has none.
    """

    model: Classifier
    info: EncoderInfo
    classes: list[str] | None
    metadata: dict[str, str]
    path: Path


def load_classifier(path: str | Path, *, image_size: tuple[int, int] | None = None) -> LoadedClassifier:
    """The classifier of a run folder (its ``model.safetensors``, or the newest training state while it still runs), of
    such a file, or of a released fine-tuned or linear-probe checkpoint.

    Args:
        image_size: (H, W) to build it for; the file's by default. Position tables are resized.

    Raises:
        CheckpointError: unreadable, or without a head.
    """
    path = weights_file(Path(path))
    checkpoint = read_checkpoint(path)
    _, metadata = read_tensors(path)
    info, tensors = checkpoint.info, checkpoint.tensors
    probe = "head.1.weight" in tensors
    weight = tensors.get("head.1.weight" if probe else "head.weight")
    if weight is None:
        raise CheckpointError(
            f"{path} has no classification head; give the model.safetensors of a classification run, or a fine-tuned "
            "checkpoint"
        )
    default = "mean" if "fc_norm.weight" in tensors else "cls"
    model = Classifier(
        num_classes=len(weight),
        pool=metadata.get("pool", default),
        probe=probe,
        pooled_norm=info.pooled_norm,
        **{**vit_arguments(info), **({} if image_size is None else {"image_size": image_size})},
    )
    load_checkpoint(model, checkpoint)
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    if set(head) != set(model.head.state_dict()):
        raise CheckpointError(f"{path}: its head holds {sorted(head)}; expected {sorted(model.head.state_dict())}")
    classes = json.loads(metadata["classes"]) if "classes" in metadata else None
    return LoadedClassifier(model=model.eval(), info=info, classes=classes, metadata=metadata, path=path)
