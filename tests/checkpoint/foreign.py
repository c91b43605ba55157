"""What the tests of foreign families share: random weights, the official names, and files that went wrong.

Official names for which no library has a class are made here from Hugging Face's, by rules of this folder alone: the
tests compare two independent readings of a family's published files.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mae_transfer import VisionTransformer
from mae_transfer.checkpoint import Checkpoint, read_checkpoint, write_safetensors
from mae_transfer.checkpoint.build import vit_arguments
from mae_transfer.checkpoint.load import load_checkpoint
from mae_transfer.errors import CheckpointError

TOLERANCE = 1e-4


@torch.no_grad()
def randomised(model: nn.Module) -> Any:
    """``model`` in evaluation mode, with weights that leave nothing at zero or one: a mistake would show."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith("weight") and parameter.ndim == 1
        parameter.copy_(1 + 0.2 * noise if is_scale else noise * (0.08 if parameter.ndim > 1 else 0.3))
    return model.eval()


def pictures(*size: int) -> Tensor:
    """Two images of (H, W)."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def read(path: Path, **overrides: Any) -> tuple[VisionTransformer, Checkpoint]:
    """The encoder that a file describes, with its weights, all of them from the file."""
    checkpoint = read_checkpoint(path)
    vit = VisionTransformer(**{**vit_arguments(checkpoint.info), **overrides}).eval()
    report = load_checkpoint(vit, checkpoint)
    assert not report.missing
    return vit, checkpoint


@torch.no_grad()
def features(vit: VisionTransformer, images: Tensor) -> Tensor:
    return vit.forward_features(images)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1  # or being close would mean little
    assert (ours - theirs).abs().max() < TOLERANCE


def renamed(tensors: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Every tensor by the name that the rules, applied one after the other, make of its own."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor.detach().clone()
    return result


def packed(tensors: Mapping[str, Tensor], parts: tuple[str, str, str], to: str) -> dict[str, Tensor]:
    """Three layers, called by ``parts`` at the end of their names, as one called ``to``; absent biases are zero."""
    result = dict(tensors)
    for name in [name for name in tensors if name.endswith(f"{parts[0]}.weight")]:
        stem = name.removesuffix(f"{parts[0]}.weight")
        weights = [result.pop(f"{stem}{part}.weight") for part in parts]
        biases = [result.pop(f"{stem}{part}.bias", torch.zeros(len(weights[0]))) for part in parts]
        result[f"{stem}{to}.weight"], result[f"{stem}{to}.bias"] = torch.cat(weights), torch.cat(biases)
    return result


def saved(model: Any) -> dict[str, Tensor]:
    """The tensors of a transformers model by the names of its published files, which differ from those in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


Damage = Callable[[dict[str, Tensor]], None]


def refusal(folder: Path, tensors: Mapping[str, Tensor], damage: Damage) -> str:
    """What is said of a file of these tensors, damaged."""
    broken = {name: tensor.clone() for name, tensor in tensors.items()}
    damage(broken)
    write_safetensors(folder / "broken.safetensors", broken, {})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder / "broken.safetensors")
    return str(caught.value)


def without(name: str) -> Damage:
    """Drops a tensor."""
    return lambda tensors: tensors.__delitem__(name)


def cut(name: str) -> Damage:
    """Leaves half of a tensor's rows."""
    return lambda tensors: tensors.update({name: tensors[name][: len(tensors[name]) // 2]})


def truncated(path: Path) -> str:
    """What is said of a file of which the second half is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    return str(caught.value)
