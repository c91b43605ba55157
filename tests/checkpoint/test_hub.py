"""Addresses on the Hub and names of timm's: from the cache without a network, and a clear word where that is empty."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save_file

from mae_transfer import build_vit, load_backbone
from mae_transfer.checkpoint import describe, hub, read_checkpoint, write_safetensors
from mae_transfer.checkpoint.convert import convert
from mae_transfer.errors import CheckpointError

SMALL = {"size": "tiny", "image_size": 32, "patch_size": 8, "width": 48, "depth": 1, "num_heads": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def repository(cache: Path, name: str, revision: str = "main") -> Path:
    """The folder of a repository's files, as if it had been fetched."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_a_repository_of_ours_is_loaded_by_its_name(cache: Path, tmp_path: Path) -> None:
    vit = build_vit(**SMALL)
    write_safetensors(tmp_path / "x.safetensors", vit.state_dict(), describe(vit, mean=(0.1, 0.2, 0.3)).to_metadata())
    folder = repository(cache, "someone/encoder", "v2")
    convert(tmp_path / "x.safetensors", folder, "hf")
    other = build_vit(**SMALL)
    load_backbone(other, "hf://someone/encoder@v2")
    assert all(torch.equal(tensor, vit.state_dict()[name]) for name, tensor in other.state_dict().items())
    info = read_checkpoint(Path("hf://someone/encoder@v2")).info  # a Path keeps one slash
    assert (info.source, info.mean, info.num_heads) == ("someone/encoder@v2", (0.1, 0.2, 0.3), 3)
    assert load_backbone(other, "hf://someone/encoder@v2/model.safetensors").loaded
    card = convert("hf://someone/encoder@v2", tmp_path / "y.pth", "timm").card
    assert card is not None and "base_model: someone/encoder\n" in card.read_text()


def test_a_repository_of_a_model_in_several_files(cache: Path) -> None:
    from transformers import ViTConfig, ViTModel

    folder = repository(cache, "someone/shards")
    config = ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, image_size=32, intermediate_size=96)
    theirs = ViTModel(config, add_pooling_layer=False)
    theirs.save_pretrained(folder, max_shard_size="40KB")
    assert not (folder / "model.safetensors").exists()
    checkpoint = read_checkpoint("hf://someone/shards")
    assert torch.equal(checkpoint.tensors["norm.weight"], theirs.layernorm.weight)
    assert (checkpoint.info.num_heads, checkpoint.info.source) == (3, "someone/shards")
    shard = next(folder.glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is not in the cache"):
        read_checkpoint("hf://someone/shards")


@pytest.mark.parametrize("said", ['"vit"', '{"mean": 0.5}', "null"])
def test_what_timm_says_in_another_way_is_not_taken(said: str, cache: Path) -> None:
    folder = repository(cache, "someone/vit")
    save_file(build_vit(**SMALL).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"architecture": "vit", "pretrained_cfg": {said}}}')
    assert read_checkpoint("hf://someone/vit").info.mean == (0.485, 0.456, 0.406)


def test_a_repository_of_others_gives_its_licence(cache: Path) -> None:
    folder = repository(cache, "someone/vit")
    save_file(build_vit(**SMALL).state_dict(), folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: openrail\ntags: [x]\n---\n# A model\n")
    (folder / "config.json").write_text('{"architecture": "vit", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}')
    info = read_checkpoint("hf://someone/vit").info
    assert (info.license, info.mean, info.source) == ("openrail", (0.5, 0.5, 0.5), "someone/vit")


def test_a_model_of_timms_is_loaded_by_its_name(cache: Path) -> None:
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    theirs = timm.create_model(name, pretrained=False).eval()
    save_file(theirs.state_dict(), repository(cache, f"timm/{name}") / "model.safetensors")
    vit = build_vit("tiny", image_size=224)
    load_backbone(vit, f"timm/{name}")
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(vit(images), theirs.forward_features(images), rtol=0, atol=1e-4)
    info = read_checkpoint(f"timm/{name}").info
    assert (info.mean, info.license, info.num_heads) == ((0.5, 0.5, 0.5), "apache-2.0", 3)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://someone/nothing", r"HF_HUB_OFFLINE is set, and encoder.safetensors is not in the cache"),
        ("hf://someone", r"expected hf://owner/name\[@revision\]\[/file\]"),
        ("timm/vit_base_patch16_224.maee", r"did you mean timm/vit_base_patch16_224\.mae"),
        ("timm/vit_base_patch16_224.mae", r"timm/vit_base_patch16_224\.mae: HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_reached_is_said(address: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(address)


@pytest.mark.parametrize(
    ("error", "says"),
    [(GatedRepoError, "accepted its terms"), (RepositoryNotFoundError, "does not exist, or is private")],
)
def test_what_is_not_given_is_said(error: type, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error("no", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint("hf://someone/gated")


def test_a_folder_of_that_name_here_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_address("timm/vit")
    Path("timm/vit").mkdir(parents=True)
    assert not hub.is_address("timm/vit") and not hub.is_address("timm/x.pth")
