"""How long a run is, how fast it learns, and values that cannot be meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import instantiate

from mae_transfer.detection.config import load_config, resolve
from mae_transfer.detection.settings import describe, settle_length
from mae_transfer.errors import run_tool
from tests.detection.test_train import TINY, arguments, main


@pytest.fixture
def scenes(make_scenes: Callable[..., Any]) -> Any:
    return make_scenes(num_images=5, side=48)


@pytest.mark.parametrize(
    ("overrides", "max_iter", "iterations"),
    [
        (["train.max_iter=70"], 70, 70),
        (["train.epochs=30"], None, 75),  # of 5 images, 2 at a time
        (["train.epochs=21", "train.batch_size=4"], None, 27),  # the last reaches into the next epoch
        (["train.epochs=null"], 900, 900),
    ],
)
def test_a_run_is_as_long_as_epochs_or_iterations_say(
    overrides: list[str], max_iter: int | None, iterations: int, scenes: Any
) -> None:
    cfg = resolve(load_config(TINY, [*scenes.overrides, *overrides, "schedule.warmup_iters=5"]))
    settle_length(cfg, 5)
    assert (cfg.train.max_iter, cfg.schedule.max_iter) == (max_iter, iterations)
    assert instantiate(cfg.schedule)(1.0) == pytest.approx(0, abs=1e-6)


def test_a_schedule_that_does_not_fit_the_epochs_is_refused_before_anything_is_written(
    scenes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(main, arguments(scenes, tmp_path / "run", "train.epochs=1", "schedule.warmup_iters=3")) == 2
    assert "warmup_iters=3 does not fit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_grows_with_the_batch_where_it_is_asked_to(scenes: Any) -> None:
    common = [*scenes.overrides, "optimizer.lr=0.001", "train.batch_size=8", "train.accumulate=2"]
    scaled = resolve(load_config(TINY, [*common, "optimizer.lr_batch_size=2"]))
    plain = resolve(load_config(TINY, common))
    assert "learning rate 0.001 x 8 / 2 = 0.004" in describe(scaled, num_images=5, num_processes=1)
    assert "learning rate 0.001, not scaled" in describe(plain, num_images=5, num_processes=1)
    rates = []
    for cfg in (scaled, plain):
        optimizer = instantiate({**cfg.optimizer, "model": instantiate(cfg.model)})
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    assert rates == pytest.approx([0.004, 0.001])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epochs=3", "train.max_iter=4"], "train.epochs=3 and train.max_iter=4 are both given"),
        (["train.max_iter=null"], "the run has no length"),
        (["train.epochs=0"], "train.epochs=0: expected a number above 0"),
        (["train.accumulate=0"], "train.accumulate=0"),
        (["train.ema=1.5"], "train.ema=1.5: expected a number between 0 and 1"),
        (["train.divergence_factor=0.5"], "train.divergence_factor=0.5: expected a factor above 1"),
        (["train.clip_norm=-1"], "train.clip_norm=-1"),
        (["train.freeze_blocks=-1"], "train.freeze_blocks=-1"),
        (["train.keep=0"], "train.keep=0"),
        (["train.best=segm/ap"], "train.best=segm/ap: no evaluation gives that; use one of segm/AP, segm/AP50"),
        (["train.best=segm/AP-cat"], "train.best=segm/AP-cat"),
        (["optimizer.lr_batch_size=0"], "optimizer.lr_batch_size=0"),
        (["optimizer.batch_size=3"], "optimizer.batch_size follows from train.batch_size"),
        (["train.accumulate=4", "train.max_iter=4"], "does not divide among 1 processes x train.accumulate=4"),
        (["train.freeze_blocks=2"], "train.freeze_blocks=2 without train.init_checkpoint"),
    ],
)
def test_what_cannot_be_meant(overrides: list[str], message: str, scenes: Any, tmp_path: Path, capsys: Any) -> None:
    assert run_tool(main, arguments(scenes, tmp_path / "run", *overrides)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_names_of_categories_can_be_what_is_best(scenes: Any) -> None:
    assert resolve(load_config(TINY, [*scenes.overrides, "train.best=bbox/AP-disc"])).train.best == "bbox/AP-disc"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-gpus", "0"], "both are at least 1"),
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank 2: expected 0 to 1"),
        (["--num-machines", "2"], "give --dist-url"),
    ],
)
def test_processes_that_cannot_be_meant(
    flags: list[str], message: str, scenes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(main, [*arguments(scenes, tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
