"""Mask R-CNN as the task of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from mae_transfer.study.compare import (
    TOOLS,
    Curve,
    Init,
    Run,
    first_encoder,
    list_option,
    read_curves,
    refuse_overrides,
)

# What the comparison itself sets in every run.
_OURS = ("train.seed", "train.init_checkpoint", "train.output_dir", "dataset.train.fraction")


class DetectionTask:
    """Trainings by ``tools/train_det.py``.

    What a random start would otherwise take from no checkpoint (patch size, mean and deviation of the images) it is
    given from the first start that has one, so that the weights are all that differs. The seed draws the heads'
    weights, the order of the images, their crops, and which images are labelled.

    Raises:
        ConfigError: an override of what the comparison sets.
    """

    metrics: ClassVar[Mapping[str, str]] = {"bbox/AP": "box AP", "segm/AP": "mask AP"}

    def __init__(self, config_file: Path, overrides: Sequence[str], inits: Sequence[Init]) -> None:
        refuse_overrides(overrides, _OURS)
        self.config_file = config_file
        self.overrides = list(overrides)
        given = {override.partition("=")[0] for override in overrides}
        info = first_encoder(inits)
        facts: dict[str, Any] = {}
        if info is not None:
            facts = {
                "model.patch_size": info.patch_size[0],
                "dataset.mean": list_option(info.mean),
                "dataset.std": list_option(info.std),
            }
        self.shared = [f"{key}={value}" for key, value in facts.items() if key not in given]

    def check(self, run: Run) -> None:
        """Raises what ``tools/train_det.py`` would refuse of the run's settings, before anything is written."""
        from mae_transfer.detection.config import load_config, resolve  # the framework, when it is needed

        resolve(load_config(self.config_file, self.settings(run)))

    def command(self, run: Run) -> list[str]:
        return [str(TOOLS / "train_det.py"), "--config-file", str(self.config_file), "--resume", *self.settings(run)]

    def settings(self, run: Run) -> list[str]:
        """Overrides of the config."""
        own = [f"train.output_dir={run.folder}", f"train.seed={run.seed}"]
        own += [f"dataset.train.fraction={run.fraction:g}", f"dataset.train.fraction_seed={run.seed}"]
        if run.init.checkpoint is not None:
            own.append(f"train.init_checkpoint={run.init.checkpoint}")
        return [*self.overrides, *self.shared, *own]

    def curves(self, run: Run) -> dict[str, Curve]:
        # A line's evaluation is of the weights after as many iterations as its number says.
        return read_curves(run.folder / "metrics.json", self.metrics, step="iteration")

    def is_finished(self, run: Run) -> bool:
        evaluation = run.folder / "evaluation.json"
        if not evaluation.is_file():
            return False
        return bool(json.loads(evaluation.read_text(encoding="utf-8"))["iteration"] >= self._length(run))

    def _length(self, run: Run) -> int:
        """Iterations of a run that has begun."""
        config = run.folder / "config.yaml"
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["max_iter"]) if config.is_file() else 0
