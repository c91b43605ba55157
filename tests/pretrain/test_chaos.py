"""Runs that die again and again end as those that were left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pictures import write_pictures
from tests.pretrain import chaos
from tests.pretrain.small import ARGUMENTS

TINY = str(Path(__file__).parents[2] / "configs" / "pretrain" / "tiny.yaml")


@pytest.mark.parametrize(
    ("kills", "steps", "processes"),
    [
        (4, 300, 1),
        pytest.param(20, 1200, 1, marks=pytest.mark.slow),
        pytest.param(6, 500, 2, marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_moments(tmp_path: Path, kills: int, steps: int, processes: int) -> None:
    pictures = write_pictures(tmp_path / "pictures", 12)
    more = (f"train.steps={steps}", "checkpoint.every_steps=4", "train.precision=bf16", "train.distributed=fsdp2")
    arguments = [TINY, f"data.path={pictures}", *ARGUMENTS, *more]
    chaos.finish([*arguments, f"run.dir={tmp_path / 'calm'}"], processes)
    deaths = chaos.torment(arguments, tmp_path / "killed", kills=kills, seed=1, processes=processes)
    assert deaths.count == kills and deaths.killed > 1 and deaths.terminated > 1
    assert deaths.while_saving >= 1, "one of them while a checkpoint was being written"
    assert chaos.differences(tmp_path / "killed", tmp_path / "calm") == []
