"""Model cards: the Hub's metadata, the licence that goes on with the weights, and nobody's README.md overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mae_transfer import build_vit
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.checkpoint.card import sha256
from mae_transfer.checkpoint.convert import convert
from mae_transfer.checkpoint.lineage import lineage
from pretrain import build_mae

SMALL = {"size": "tiny", "image_size": 32, "patch_size": 8, "width": 48, "depth": 1, "num_heads": 3}


def head(card: Path) -> dict[str, Any]:
    """The metadata block, as the Hub's own library reads it."""
    from huggingface_hub import ModelCard

    content = ModelCard.load(card).data.to_dict()
    assert content == yaml.safe_load(card.read_text().split("---")[1])
    return content


@pytest.fixture
def own(tmp_path: Path) -> Path:
    vit = build_vit(**SMALL)
    path = tmp_path / "run" / "encoder.safetensors"
    write_safetensors(path, vit.state_dict(), describe(vit, git_commit="abc123").to_metadata())
    return path


def test_an_official_mae_file_is_not_for_commerce(tmp_path: Path) -> None:
    mae = build_mae(**SMALL, decoder_width=32, decoder_depth=1, decoder_num_heads=2)
    torch.save({"model": mae.state_dict()}, tmp_path / "mae_pretrain_vit_tiny.pth")
    done = convert(tmp_path / "mae_pretrain_vit_tiny.pth", tmp_path / "out" / "x.safetensors", "backbone")
    assert done.card == tmp_path / "out" / "README.md"
    values, text = head(done.card), done.card.read_text()
    assert values["license"] == "cc-by-nc-4.0"
    assert values["library_name"] == "mae-transfer" and values["pipeline_tag"] == "image-feature-extraction"
    for part in (
        "no commercial use",
        "mae_pretrain_vit_tiny.pth",
        sha256(done.destination),
        "| left out | the decoder (",
    ):
        assert part in text, part
    # The licence goes on with the file that was written.
    again = convert(done.destination, tmp_path / "again" / "x.pth", "timm")
    assert head(again.card)["license"] == "cc-by-nc-4.0"


def test_a_licence_goes_on_through_training(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert lineage(None) == {} == lineage(own)
    mae = build_mae(**SMALL, decoder_width=32, decoder_depth=1, decoder_num_heads=2)
    torch.save({"model": mae.state_dict()}, tmp_path / "official.pth")
    assert lineage(tmp_path / "official.pth") == {"source": "official.pth", "license": "cc-by-nc-4.0"}
    assert lineage(tmp_path / "gone.pth") == {} and "not known any more" in caplog.text


def test_an_unknown_licence_is_said_to_be_unknown(own: Path, tmp_path: Path) -> None:
    (own.parent / "config.yaml").write_text("train:\n  epochs: 3\ndata:\n  path: /home/me/images\n")
    (own.parent / "metrics.jsonl").write_text("")
    card = convert(own, tmp_path / "out" / "x.safetensors", "backbone").card
    assert card is not None and head(card)["license"] == "unknown"
    text = card.read_text()
    assert "ask its authors" in text and "abc123" in text and "  epochs: 3" in text and "/home/me" not in text


def test_only_its_own_card_is_written_again(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(own, out / "x.safetensors", "backbone").card
    assert first == out / "README.md"
    assert convert(own, out / "x.safetensors", "backbone", overwrite=True).card == first
    assert convert(own, out / "y.pth", "timm").card == out / "y.pth.README.md"
    first.write_text("# Mine\n")
    assert convert(own, out / "x.safetensors", "backbone", overwrite=True).card == out / "x.safetensors.README.md"
    assert first.read_text() == "# Mine\n"
    assert convert(own, out / "z.pth", "timm", card=False).card is None
