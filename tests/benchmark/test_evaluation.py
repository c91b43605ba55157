"""The evaluation benchmark times two programs that say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_transfer.benchmark import evaluation
from mae_transfer.benchmark.cli import main
from mae_transfer.errors import RunFailed


@pytest.mark.parametrize("part", list(evaluation.KINDS))
def test_both_give_the_same_numbers(part: str) -> None:
    ours, theirs = evaluation.contestants(part, num_images=8, detections=20)
    for contestant in (ours, theirs):
        contestant.set_up()
        contestant.turn()
    assert isinstance(ours, evaluation.Ours)
    assert isinstance(theirs, evaluation.Peer)
    assert {name: ours.scores[name] for name in theirs.scores} == pytest.approx(theirs.scores, abs=1e-9)
    first = dict(theirs.scores)
    theirs.turn()  # on untouched data again
    assert theirs.scores == first
    assert 10 < first["AP50"] < 90  # neither trivial nor hopeless


def test_a_difference_is_no_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.Peer, "turn", lambda self: self.scores.update(AP=1.0))
    with pytest.raises(RunFailed, match=r"disagree on boxes: AP .* and 1\.000000"):
        evaluation.contestants("boxes", num_images=3, detections=5)


@pytest.mark.slow
def test_it_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluation", "--images", "5", "--detections", "5", "--rounds", "1", "--threads", "1"]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 0
    assert "pycocotools" in capsys.readouterr().out
    assert (tmp_path / "out.json").is_file()
