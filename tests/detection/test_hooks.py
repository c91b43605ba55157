"""What surrounds the steps: metrics without gaps or repeats, checkpoints, the best one, and the end of a bad run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn

from mae_transfer.detection.checkpointer import StrictCheckpointer
from mae_transfer.detection.hooks import (
    Evaluate,
    FollowSchedule,
    KeepBest,
    RecordMetrics,
    SaveCheckpoints,
    StopOnDivergence,
)
from mae_transfer.detection.optimizer import schedule
from mae_transfer.detection.trainer import Trainer
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import CheckpointError, ConfigError, RunFailed


class Loss(nn.Module):
    """Its loss is what the batch says; the weight grows by a known amount a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: float) -> dict[str, torch.Tensor]:
        return {"loss": -self.weight.sum() + self.weight.sum().detach() + batch}


def run(
    folder: Path, losses: list[float], more: list[HookBase], *, start: int = 0, facts: dict[str, int] | None = None
) -> tuple[Trainer, StrictCheckpointer]:
    """A training whose iteration i has loss ``losses[i]``, from ``start`` on, resumed if that is above 0."""
    folder.mkdir(exist_ok=True)
    model = Loss()
    trainer = Trainer(
        model,
        losses[start:],
        torch.optim.SGD(model.parameters(), lr=1.0),
        precision=Precision("fp32", torch.device("cpu")),
        seed=0,
        facts=facts,
    )
    checkpointer = StrictCheckpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks(more)
    if start:
        checkpointer.load(checkpointer.last_good())
        assert trainer.iter + 1 == start
    record = RecordMetrics(folder / "metrics.json", start=start, period=2)
    save = SaveCheckpoints(checkpointer, StopRequest(), period=3, keep=2, before_save=record.flush)
    trainer.register_hooks([record, save])
    trainer.train(start, len(losses))
    return trainer, checkpointer


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def scores_of(done: int) -> dict[str, float]:
    return {"segm/AP": {2: 10.0, 4: 30.0, 6: 20.0, 7: 25.0}[done]}


def test_every_iteration_has_one_line_and_evaluations_stand_where_their_weights_do(tmp_path: Path) -> None:
    run(tmp_path, [float(i) for i in range(7)], [Evaluate(scores_of, period=2)])
    got = lines(tmp_path)
    assert [line["iteration"] for line in got] == list(range(8))
    assert [line.get("total_loss") for line in got] == [*map(float, range(7)), None]
    assert {line["iteration"]: line["segm/AP"] for line in got if "segm/AP" in line} == {2: 10, 4: 30, 6: 20, 7: 25}


def test_lines_beyond_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    evaluated: list[int] = []

    def evaluate(done: int) -> dict[str, float]:
        evaluated.append(done)
        return scores_of(done)

    class Die(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter == 4:
                raise KeyboardInterrupt

    losses = [float(i) for i in range(7)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, losses, [Evaluate(evaluate, period=2), Die()])
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]  # one more than the checkpoint
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 5, "total')  # cut off by a kill
    run(tmp_path, losses, [Evaluate(evaluate, period=2)], start=3)
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(8))
    assert evaluated == [2, 4, 4, 6, 7]
    # Going on from the end evaluates again, and that is all.
    run(tmp_path, losses, [Evaluate(evaluate, period=2)], start=7)
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(8))


def test_a_killed_evaluation_is_done_on_resume(tmp_path: Path) -> None:
    def die(done: int) -> dict[str, float]:
        raise KeyboardInterrupt

    losses = [0.0] * 6
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, losses, [Evaluate(die, period=3)])
    run(tmp_path, losses, [Evaluate(lambda done: {"segm/AP": float(done)}, period=3)], start=3)
    assert {line["iteration"]: line["segm/AP"] for line in lines(tmp_path) if "segm/AP" in line} == {3: 3, 6: 6}


def test_the_newest_checkpoints_are_kept_over_a_resume(tmp_path: Path) -> None:
    run(tmp_path, [0.0] * 9, [])
    run(tmp_path, [0.0] * 13, [], start=9)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000008.pth", "model_0000011.pth", "model_final.pth"]
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 12


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, checkpointer = run(tmp_path, [0.0] * 7, [])
    for name, expected in (("model_final.pth", "model_0000005.pth"), ("model_0000005.pth", "model_0000002.pth")):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
        assert Path(checkpointer.last_good()).name == expected
        assert f"{name} is cut off" in caplog.text
    (tmp_path / "model_0000002.pth").unlink()
    with pytest.raises(CheckpointError, match="is whole; start the run anew"):
        checkpointer.last_good()


def test_the_best_is_kept_and_remembered_over_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 2, "segm/AP": 20.0}\n{"iteration": 4, "segm/AP": null}\n')
    model = Loss()
    best = KeepBest(StrictCheckpointer(model, str(tmp_path)), "segm/AP", tmp_path / "metrics.json")
    for done, score in ((6, 15.0), (8, 25.0), (10, 24.0), (12, math.nan)):
        model.weight.data.fill_(done)
        best.consider({"segm/AP": score, "bbox/AP": 99.0}, done)
    best.consider({}, 14)  # as in all processes but the first
    assert not caplog.records
    best.consider({"bbox/AP": 99.0}, 16)
    assert "nothing to compute segm/AP from" in caplog.text
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (saved["model"]["weight"].item(), saved["iteration"], saved["segm/AP"]) == (8, 7, 25)
    assert not (tmp_path / "last_checkpoint").exists()  # not to be gone on from


def test_learning_rates_follow_todays_schedule_from_where_the_run_is(tmp_path: Path) -> None:
    factor = schedule(max_iter=10, kind="cosine", warmup_iters=2)
    model = Loss()
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0}]
    optimizer = torch.optim.SGD(groups)
    trainer = Trainer(
        model,
        [0.0] * 3,
        optimizer,
        precision=Precision("fp32", torch.device("cpu")),
        seed=0,
    )
    trainer.register_hooks([FollowSchedule(optimizer, factor, 10)])
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the groups, as resuming does
    trainer.train(4, 7)
    assert trainer.storage.history("lr").values() == [(pytest.approx(2 * factor(i / 10)), i) for i in (4, 5, 6)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * factor(0.6))


def test_a_run_is_gone_on_with_at_todays_learning_rate_and_yesterdays_momentum(tmp_path: Path) -> None:
    def trainer(lr: float) -> Trainer:
        model = Loss()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return Trainer(model, [0.0] * 2, optimizer, precision=Precision("fp32", torch.device("cpu")), seed=0)

    first = trainer(1.0)
    first.train(0, 1)
    second = trainer(0.1)
    second.load_state_dict(first.state_dict())
    second.train(1, 2)
    # The gradient is always -1: the momentum buffer is -1, then -1.9.
    assert second.model.weight.item() == pytest.approx(0.19)


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [0.0] * 3, [], facts={"number of images": 4})
    with pytest.raises(ConfigError, match="trained with number of images=4 and this run has 5"):
        run(tmp_path, [0.0] * 6, [], facts={"number of images": 5}, start=3)


def test_divergence_ends_the_run_and_a_hard_batch_does_not(tmp_path: Path) -> None:
    healthy = [3.0 - 0.01 * i for i in range(100)]
    healthy[50] = 300.0
    run(tmp_path / "healthy", healthy, [StopOnDivergence(4.0)])
    with pytest.raises(RunFailed, match="the last 10 iterations, up to 109"):
        run(tmp_path / "diverged", [*healthy, *[20.0] * 30], [StopOnDivergence(4.0)])
    # Resumed, the losses before the checkpoint count: it ends where it ended.
    with pytest.raises(RunFailed, match="up to 109"):
        run(tmp_path / "diverged", [*healthy, *[20.0] * 30], [StopOnDivergence(4.0)], start=108)


def test_batches_of_empty_images_among_others_are_no_divergence(tmp_path: Path) -> None:
    class Window:
        """A trainer as far as the hook looks at it."""

        iter = 0
        storage = EventStorage()

    hook = StopOnDivergence(4.0)
    hook.trainer = Window()
    rng = np.random.default_rng(0)
    for loss in np.where(rng.random(20_000) < 0.45, 1.5, 0.05) * rng.uniform(0.7, 1.3, 20_000):
        hook.trainer.storage.put_scalar("total_loss", loss)
        hook.after_step()


def test_a_full_disk_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunFailed, match="No space left"):
        run(tmp_path, [0.0] * 3, [])
