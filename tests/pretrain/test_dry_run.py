"""What --dry-run says, against what can be known beforehand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mae_transfer.engine.rehearsal import parameter_table
from mae_transfer.errors import run_tool
from pretrain import build_mae
from pretrain.cli import main
from pretrain.planner import training_flops
from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS

TINY = str(Path(__file__).parents[2] / "configs" / "pretrain" / "tiny.yaml")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 12)


@pytest.mark.parametrize("variant", [(), ("model.decoder=cross",), ("model.checkpointing=true", "train.accumulate=2")])
def test_report(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: tuple[str, ...]) -> None:
    more = (f"data.val_path={pictures}", "log.reconstruct_every_epochs=4", "train.steps=300", "log.peak_gflops=100")
    command = [TINY, f"data.path={pictures}", f"run.dir={tmp_path / 'run'}", *ARGUMENTS, *more, *variant]
    assert run_tool(main, [*command, "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    cross = "model.decoder=cross" in variant
    model = build_mae(
        size="tiny",
        image_size=16,
        patch_size=4,
        width=32,
        depth=2,
        num_heads=2,
        decoder_width=32,
        decoder_depth=1,
        decoder_num_heads=2,
        decoder="cross" if cross else "self",
    )
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters / 1e6:.2f} M parameters" in text and "decoder_blocks" in text
    formula, counted = map(float, re.search(r"([\d.]+) GFLOP an image by formula, ([\d.]+) by counter", text).groups())
    assert formula == pytest.approx(training_flops(model) / 1e9, rel=0.01)
    if "model.checkpointing=true" in variant:
        assert counted > 1.15 * formula
    else:
        assert counted == pytest.approx(formula, rel=0.06)
    seconds, speed, rate, share = map(
        float, re.search(r"step +([\d.e-]+) s .*, ([\d.]+) images/s, ([\d.e+-]+) GFLOP/s = (\d+)%", text).groups()
    )
    assert speed == pytest.approx(8 / seconds, rel=0.02) and share == pytest.approx(rate, abs=1)
    assert "of the given 100 (MFU)" in text
    assert 0 <= float(re.search(r"data wait +([\d.]+)%", text)[1]) <= 100
    assert re.search(r"projected time .*steps .*, 38 x evaluation .*, 50 x pictures ", text)
    assert re.search(r"peak memory +[\d.]+ GiB a process .*a GPU would hold [\d.]+ by formula", text)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int) -> None:
    small = [*ARGUMENTS, f"train.steps={steps}", "optim.warmup_epochs=0", "log.peak_gflops=100"]
    assert run_tool(main, [TINY, f"data.path={pictures}", f"run.dir={tmp_path / 'run'}", *small, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{steps} steps of 8" in text and f"(median of {max(1, steps - 2)})" in text


def test_without_fvcore_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_mae(size="tiny", image_size=32, depth=1)
    assert "pos_embed" in parameter_table(model) and "patch_embed" in parameter_table(model)
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    assert "pip install fvcore" in parameter_table(model)
