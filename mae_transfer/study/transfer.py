"""What trainings of detection, segmentation and classification have in common as tasks of a comparison."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mae_transfer.checkpoint import EncoderInfo, read_checkpoint
from mae_transfer.errors import ConfigError
from mae_transfer.study.compare import Curve, Init, Run


class TransferTask(ABC):
    """Trainings by a tool that takes key=value and writes ``metrics.json``, one object a line.

    What a random start would otherwise take from no checkpoint (patch size, mean and deviation of the images) it is
    given from the first start that has one, so that the weights are all that differs. The seed draws the heads'
    weights, the order of the images, their crops, and which images are labelled.

    Args:
        config_file: of the trainings.
        overrides: key=value, for every run.
        inits: the starts that are compared.

    Raises:
        ConfigError: an override of what the comparison sets.
    """

    metrics: ClassVar[Mapping[str, str]]  # key of a metric -> how it is called
    metrics_file: ClassVar[str] = "metrics.json"  # of a run, one object a line
    ours: ClassVar[Sequence[str]]  # keys that the comparison itself sets in every run
    step_key: ClassVar[str]  # of a line of metrics.json: how many iterations its evaluation comes after

    def __init__(self, config_file: Path, overrides: Sequence[str], inits: Sequence[Init]) -> None:
        given = {override.partition("=")[0]: override for override in overrides}
        for key in self.ours:
            if key in given:
                raise ConfigError(f"{given[key]}: the comparison sets {key} itself")
        self.config_file = config_file
        self.overrides = list(overrides)
        first = next((init.checkpoint for init in inits if init.checkpoint is not None), None)
        facts = {} if first is None else self.facts(read_checkpoint(first).info)
        self.shared = [f"{key}={value}" for key, value in facts.items() if key not in given]

    @abstractmethod
    def facts(self, info: EncoderInfo) -> dict[str, Any]:
        """Keys and values that say of the encoder and its images what a checkpoint otherwise would."""

    @abstractmethod
    def own(self, run: Run) -> list[str]:
        """Keys and values of one run."""

    def settings(self, run: Run) -> list[str]:
        """Everything that a run is given over its config."""
        return [*self.overrides, *self.shared, *self.own(run)]

    def curves(self, run: Run) -> dict[str, Curve]:
        """Metric -> (step, value) so far."""
        found: dict[str, dict[int, float]] = {metric: {} for metric in self.metrics}
        path = run.folder / self.metrics_file
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            values = json.loads(line)
            for metric, points in found.items():
                if metric in values:
                    points[values[self.step_key]] = values[metric]
        return {metric: sorted(points.items()) for metric, points in found.items()}


def list_option(values: Iterable[float]) -> str:
    """Numbers as command lines take them: "[0.5,1.0]"."""
    return f"[{','.join(repr(float(value)) for value in values)}]"
