"""Between two readings of the losses nothing is read back from the device: on a GPU that would stop the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mae_transfer.engine.config import read_config
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.run_folder import RunFolder
from pretrain.config import PretrainConfig
from pretrain.objective import PretrainRun
from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS

# What makes the host wait for a device: a value as a Python number, or a shape that depends on values.
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2")


class Reads(TorchDispatchMode):
    """Names of the operations that read values back, backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(READS):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_recorder_sees_what_it_is_for() -> None:
    with Reads() as reads:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
        torch.ones(3).nonzero()
    assert len(reads.seen) == 3


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_ordinary_steps_read_nothing_back(tmp_path: Path, decoder: str) -> None:
    pictures = write_pictures(tmp_path / "pictures", 12)
    more = ("train.steps=12", "train.ema=0.9", "optim.clip_grad=1.0", "train.accumulate=2", "train.precision=bf16")
    overrides = [*ARGUMENTS, *more, f"data.path={pictures}", f"model.decoder={decoder}", "log.peak_gflops=1"]
    run = PretrainRun(read_config(PretrainConfig, None, overrides), Processes(device=torch.device("cpu")))
    trainer = run.trainer(RunFolder(tmp_path / "run"))
    trainer.model.train()
    batches = run.batches(0)
    trainer._train_step(batches)  # AdamW makes its state
    with Reads() as reads:
        for _ in range(4):
            trainer._train_step(batches)
    assert reads.seen == []
    assert len(trainer._pending) == 5 and all(values.shape == (2,) for *_, values in trainer._pending)
