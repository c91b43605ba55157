"""The loop on a small regression, where everything can be computed by hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_transfer.engine.checkpoints import CheckpointConfig, latest_checkpoint, open_state
from mae_transfer.engine.distribution import Processes, processes
from mae_transfer.engine.metrics import MetricsLog, read_metrics
from mae_transfer.engine.optimizer import OptimConfig, build_adamw, decay_groups
from mae_transfer.engine.precision import Precision
from mae_transfer.engine.run_folder import RunConfig, RunFolder, open_run_folder
from mae_transfer.engine.trainer import Hook, TrainConfig, Trainer
from mae_transfer.errors import ConfigError, RunFailed

CPU = torch.device("cpu")
BATCH = 8


def data(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(step))
    return x, x.sum(dim=1, keepdim=True)


class Regression:
    """A linear model, its trainer and what the trainer called."""

    def __init__(self, folder: Path, *, num_steps: int = 6, poison: tuple[int, ...] = (), **changes: Any) -> None:
        self.folder, _ = open_run_folder(RunConfig(dir=str(folder), resume="auto"))
        self.folder.write_description("")
        self.accumulate = changes.pop("accumulate", 1)
        self.poison = poison
        self.kept: list[int] = []
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        optimizer = build_adamw(decay_groups(self.model, 0.01), OptimConfig(base_lr=0.1))
        arguments: dict[str, Any] = {
            "model": self.model,
            "module": self.model,
            "optimizer": optimizer,
            "schedule": lambda step: 0.1,
            "loss": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
            "batches": self.batches,
            "keep_inputs": lambda step, folder: self.kept.append(step),
            "num_steps": num_steps,
            "num_samples": 24,
            "train": TrainConfig(
                batch_size=BATCH,
                accumulate=self.accumulate,
                max_skipped=changes.pop("max_skipped", 2),
            ),
            "precision": Precision("fp32", CPU),
            "checkpoint": CheckpointConfig(every_steps=3, keep=5),
            "log_every_steps": 2,
            "clip_grad": None,
            "processes": Processes(device=CPU),
            "folder": self.folder,
            "metrics": MetricsLog(self.folder.metrics, last_step=changes.pop("last_step", 0)),
        }
        self.trainer = Trainer[tuple[Tensor, Tensor]](**{**arguments, **changes})

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, 1000):
            x, y = data(step)
            if step in self.poison:
                x = x * float("nan")
            yield from zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True)

    def losses(self) -> list[float]:
        return [record["loss"] for record in read_metrics(self.folder.metrics)]


@pytest.fixture
def regression() -> Iterator[Callable[..., Regression]]:
    made: list[Regression] = []

    def make(*args: Any, **changes: Any) -> Regression:
        made.append(Regression(*args, **changes))
        return made[-1]

    yield make
    for run in made:
        assert run.trainer.metrics is not None
        run.trainer.metrics.close()


def test_each_line_is_that_steps_loss(tmp_path: Path, regression: Callable[..., Regression]) -> None:
    run = regression(tmp_path)
    weights, bias = run.model.weight.detach().clone(), run.model.bias.detach().clone()
    assert run.trainer.run() is None
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    # Against torch's plain AdamW, step by step.
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(weights)
        model.bias.copy_(bias)
    groups = [{"params": [model.weight], "weight_decay": 0.01}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), foreach=False, fused=False)
    expected = []
    for step in range(6):
        x, y = data(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert run.losses() == pytest.approx(expected, rel=1e-5)


def test_accumulation_is_the_large_batch(tmp_path: Path, regression: Callable[..., Regression]) -> None:
    whole, parts = regression(tmp_path / "whole"), regression(tmp_path / "parts", accumulate=4)
    whole.trainer.run()
    parts.trainer.run()
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)
    torch.testing.assert_close(parts.model.weight, whole.model.weight, rtol=1e-4, atol=1e-6)


def test_resumed_to_the_last_bit(tmp_path: Path, regression: Callable[..., Regression]) -> None:
    whole = regression(tmp_path / "whole", num_steps=9)
    whole.trainer.run()
    first = regression(tmp_path / "parts", num_steps=6)
    first.trainer.run()
    second = regression(tmp_path / "parts", num_steps=9, last_step=6)
    latest = latest_checkpoint(second.folder.checkpoints)
    assert latest is not None and latest.name == "step-00000006.pt"
    second.trainer.load(open_state(latest))
    second.trainer.run()
    assert second.losses() == whole.losses()
    assert torch.equal(second.model.weight, whole.model.weight)


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, regression: Callable[..., Regression]) -> None:
    run = regression(tmp_path, poison=(2,))
    run.trainer.run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["loss"] is None for record in records] == [False, False, True, False, False, False]
    assert run.kept == [3] and run.trainer.skipped == 1
    assert torch.isfinite(run.model.weight).all()
    # As if the step had not been: the optimiser's moments and its step count are untouched.
    state = run.trainer.optimizer.state[run.model.weight]
    assert state["step"].item() == 5 and torch.isfinite(state["exp_avg"]).all()


def test_too_many_of_them_fail_the_run_with_advice(tmp_path: Path, regression: Callable[..., Regression]) -> None:
    run = regression(tmp_path, poison=tuple(range(1, 100)), num_steps=50)
    with pytest.raises(RunFailed, match=r"lower\s+optim.base_lr .* optim.clip_grad=1; train.precision=fp32"):
        run.trainer.run()
    assert len(run.kept) == 3


def test_clipping(tmp_path: Path, regression: Callable[..., Regression]) -> None:
    run = regression(tmp_path, clip_grad=1e-3, num_steps=1)
    run.trainer.run()
    moment = torch.cat([run.trainer.optimizer.state[p]["exp_avg"].flatten() for p in run.model.parameters()])
    assert moment.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["grad_norm"] > 1e-3, "the norm before clipping is recorded"


def test_hooks_run_in_evaluation_mode_and_add_to_their_steps_line(
    tmp_path: Path, regression: Callable[..., Regression]
) -> None:
    seen: list[tuple[int, bool]] = []
    run = regression(tmp_path)

    def evaluate(step: int) -> dict[str, float]:
        seen.append((step, run.model.training))
        return {"val_loss": float(step)}

    run.trainer.hooks = [Hook(every_steps=4, run=evaluate)]
    run.trainer.run()
    assert seen == [(4, False), (6, False)]
    assert run.model.training
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert {record["step"]: record["val_loss"] for record in records if "val_loss" in record} == {4: 4.0, 6: 6.0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_after_the_step(
    tmp_path: Path, regression: Callable[..., Regression], number: signal.Signals
) -> None:
    run = regression(tmp_path, num_steps=100)
    before = signal.getsignal(number)
    run.trainer.hooks = [Hook(every_steps=4, run=lambda step: os.kill(os.getpid(), number) or {})]
    stopped_by = run.trainer.run()
    assert stopped_by == number.name
    assert len(run.losses()) == run.trainer.step == 5  # noticed after the step that follows
    latest = latest_checkpoint(run.folder.checkpoints)
    assert latest is not None and open_state(latest).facts["step"] == 5
    assert signal.getsignal(number) is before


def test_other_data_is_no_continuation(tmp_path: Path, regression: Callable[..., Regression]) -> None:
    run = regression(tmp_path)
    run.trainer.run()
    latest = latest_checkpoint(run.folder.checkpoints)
    assert latest is not None
    with pytest.raises(ConfigError, match="trained on 24 images an epoch and the training data now give 25"):
        regression(tmp_path / "b", num_samples=25).trainer.load(open_state(latest))
    with pytest.raises(ConfigError, match="past this run's end"):
        regression(tmp_path / "c", num_steps=5).trainer.load(open_state(latest))


def test_precision() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Precision(name, CPU).autocast():
            assert layer(x).dtype == dtype
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Precision("fp16", CPU)


def test_devices() -> None:
    with processes("cpu") as alone:
        assert alone.device == CPU and alone.is_main and not alone.is_distributed
    with pytest.raises(ConfigError, match="use auto, cpu or cuda"), processes("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"), processes("cuda"):
            pass


def test_run_folder_paths(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert (folder.model.name, folder.encoder.name) == ("model.safetensors", "encoder.safetensors")
