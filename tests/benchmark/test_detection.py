"""tools/benchmark.py detection at a size of seconds: that both compute the same, and what is printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mae_transfer.benchmark import detection
from mae_transfer.benchmark.cli import main
from mae_transfer.benchmark.detection import RUNS, Setting, check_same_features, detectron2_backbone
from mae_transfer.errors import ConfigError, RunFailed

SMALL = Setting(size="tiny", image_size=64)


@pytest.mark.slow
def test_prints_ratios_and_writes_what_it_measured(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    arguments = ["--size", "tiny", "--image-size", "64", "--rounds", "2", "--threads", "1", "--precision", "bf16"]
    assert main(["detection", *arguments, "--parts", "forward-backward", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the backbone forward and backward: tiny, 64 px, batch 1, bf16" in printed
    assert "ours is faster by" in printed
    (result,) = json.loads(out.read_text())["results"]
    assert result["precision"] == "bf16"
    assert all(len(result["seconds"][name]) == 2 for name in ("ours", "detectron2"))


@pytest.mark.parametrize("part", ["forward", pytest.param("step", marks=pytest.mark.slow), "latency"])
@pytest.mark.parametrize("name", ["ours", "detectron2"])
def test_every_part_runs(part: str, name: str) -> None:
    threads = torch.get_num_threads()
    contestant = RUNS[part](name, SMALL)
    contestant.set_up()
    contestant.turn()
    assert torch.get_num_threads() == threads


def test_both_steps_begin_with_the_same_losses() -> None:
    """In evaluation mode nothing is dropped; the heads draw the same samples from the same seed."""
    losses = []
    for peer in (False, True):
        from detectron2.utils.events import EventStorage

        model = SMALL.detector(peer=peer).train()
        model.get_submodule("backbone").eval()
        torch.manual_seed(0)
        with EventStorage(), torch.no_grad():
            losses.append({name: loss.item() for name, loss in model(SMALL.batch()).items()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_other_features_are_noticed(monkeypatch) -> None:
    check_same_features(SMALL)

    def spoilt(ours: torch.nn.Module, setting: Setting) -> torch.nn.Module:
        peer = detectron2_backbone(ours, setting)
        torch.nn.init.ones_(peer.net.blocks[0].attn.rel_pos_h)  # type: ignore[union-attr,index]
        return peer

    monkeypatch.setattr(detection, "detectron2_backbone", spoilt)
    with pytest.raises(RunFailed, match="not the same computation"):
        check_same_features(SMALL)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--image-size", "100"], "multiple of 32"),
        (["--size", "huge"], "patches of 16"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        main(["detection", *arguments])
