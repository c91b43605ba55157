"""Half a decoder is not written: what it lacks is said, and the encoder alone is written all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_transfer.checkpoint import read_checkpoint
from mae_transfer.checkpoint.convert import convert
from mae_transfer.checkpoint.detectors import read_detector
from mae_transfer.checkpoint.info import infer_info
from mae_transfer.checkpoint.inspection import inspect
from mae_transfer.errors import CheckpointError
from pretrain import build_mae


@pytest.fixture(scope="module")
def masked_autoencoder() -> dict[str, Tensor]:
    decoder = {"decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 2}
    return build_mae(size="tiny", image_size=32, patch_size=8, width=64, num_heads=1, depth=2, **decoder).state_dict()


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"model": tensors}, folder / "mae.pth")
    return folder / "mae.pth"


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), ("mae", "out.pth")])
@pytest.mark.parametrize(
    "missing", ["decoder_pred.weight", "decoder_norm.bias", "decoder_blocks.1.mlp.fc2.bias", "mask_token"]
)
def test_a_decoder_that_lacks_a_tensor(
    to: str, name: str, missing: str, masked_autoencoder: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(tmp_path, {name: tensor for name, tensor in masked_autoencoder.items() if name != missing})
    with pytest.raises(CheckpointError, match=f"the decoder lacks {missing.replace('.1.', '.[*1].')}"):
        convert(path, tmp_path / name, to)
    assert not (tmp_path / name).exists() and "the decoder lacks" in inspect(path)
    convert(path, tmp_path / name, to, encoder_only=True)
    assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-1], lambda t: t.flatten()[0], lambda t: t[None], lambda t: t[..., :1]]
)
@pytest.mark.parametrize("name", ["decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_norm.weight"])
def test_a_decoder_of_other_shapes(
    name: str, damage: Any, masked_autoencoder: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(tmp_path, {**masked_autoencoder, name: damage(masked_autoencoder[name]).clone()})
    for to, destination in (("hf", "out"), ("mae", "out.pth")):
        with pytest.raises(CheckpointError, match="the decoder is of shapes that do not go together"):
            convert(path, tmp_path / destination, to)
    assert "do not go together" in inspect(path)


@pytest.mark.parametrize("shape", [(1, 17, 63), (1, 0, 64), (17, 64)])
def test_positions_of_another_width_are_said_so(
    shape: tuple[int, ...], masked_autoencoder: dict[str, Tensor], tmp_path: Path
) -> None:
    broken = {**masked_autoencoder, "pos_embed": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match="pos_embed is"):
        infer_info(broken, family="mae", source="a file")
    path = write(tmp_path, broken)
    with pytest.raises(CheckpointError, match="pos_embed"):
        read_checkpoint(path)
    heads = {f"{part}.a": torch.zeros(1) for part in ("proposal_generator", "roi_heads")}
    whole = write(tmp_path, {f"backbone.net.{name}": tensor for name, tensor in broken.items()} | heads)
    with pytest.raises(CheckpointError, match="pos_embed is"):
        read_detector(whole)
