"""tools/benchmark.py segmentation at a size of seconds: that both compute the same, and what is printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="MMSegmentation is not installed")

from mae_transfer.benchmark import segmentation
from mae_transfer.benchmark.cli import main
from mae_transfer.benchmark.segmentation import RUNS, Setting, check_same, mmseg_segmentor
from mae_transfer.errors import ConfigError, RunFailed

SMALL = Setting(size="tiny", image_size=64)

# What MMSegmentation's own model and loss warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore`` is False:UserWarning"),
]


@pytest.mark.slow
def test_prints_ratios_and_writes_what_it_measured(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    arguments = ["--size", "tiny", "--image-size", "64", "--rounds", "2", "--threads", "1", "--precision", "bf16"]
    assert main(["segmentation", *arguments, "--parts", "sliding", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "sliding-window inference of one 4:3 image" in printed
    assert "ours is faster by" in printed
    (result,) = json.loads(out.read_text())["results"]
    assert result["precision"] == "bf16"
    assert all(len(result["seconds"][name]) == 2 for name in ("ours", "mmseg"))


@pytest.mark.parametrize("part", ["forward", "encoder", "step", "sliding"])
@pytest.mark.parametrize("name", ["ours", "mmseg"])
def test_every_part_runs(part: str, name: str) -> None:
    threads = torch.get_num_threads()
    contestant = RUNS[part](name, SMALL)
    contestant.set_up()
    contestant.turn()
    assert torch.get_num_threads() == threads


def test_both_steps_begin_with_the_same_losses() -> None:
    """In evaluation mode nothing is dropped and batch normalisation has no batch."""
    losses = []
    for peer in (False, True):
        model = SMALL.segmentor(peer=peer)
        model.train(False)
        with torch.no_grad():
            data = model.data_preprocessor(SMALL.batch(), True)
            losses.append({name: value.item() for name, value in model(**data, mode="loss").items()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_other_features_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_same(SMALL)

    def spoilt(ours: torch.nn.Module, setting: Setting) -> torch.nn.Module:
        peer = mmseg_segmentor(ours, setting)
        torch.nn.init.ones_(peer.backbone.layers[0].attn.relative_position_bias_table[:, 0])  # type: ignore[union-attr,index]
        return peer

    monkeypatch.setattr(segmentation, "mmseg_segmentor", spoilt)
    with pytest.raises(RunFailed, match="not the same computation"):
        check_same(SMALL)


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
        main(["segmentation", *arguments])
