from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.engine.distribution import Processes
from tests.classification.small import small_config, write_classes


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``val``, four classes each, of six and three small pictures."""
    root = tmp_path_factory.mktemp("classes")
    write_classes(root / "train")
    write_classes(root / "val", images=3, seed=1)
    return root


@pytest.fixture
def run(classes: Path) -> ClassificationRun:
    """A fine-tuning of the small model, before its first step."""
    from mae_transfer.engine.trainer import TrainConfig  # noqa: F401

    config = small_config(classes / "train", str(classes / "val"))
    return ClassificationRun(config, Processes(device=torch.device("cpu")))
