"""Mask R-CNN as the task of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import yaml

from mae_transfer.checkpoint import EncoderInfo, weights_arguments
from mae_transfer.study.compare import Run
from mae_transfer.study.jobs import TOOLS
from mae_transfer.study.transfer import TransferTask, list_option


class DetectionTask(TransferTask):
    """Trainings by ``tools/train_det.py``."""

    metrics: ClassVar[Mapping[str, str]] = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
    ours = ("train.seed", "train.init_checkpoint", "train.output_dir", "dataset.train.fraction")
    step_key = "iteration"

    def facts(self, info: EncoderInfo) -> dict[str, Any]:
        encoder = weights_arguments(info)
        return {
            **({"model.encoder": json.dumps(encoder)} if encoder else {}),
            "model.patch_size": info.patch_size[0],
            "dataset.mean": list_option(info.mean),
            "dataset.std": list_option(info.std),
        }

    def own(self, run: Run) -> list[str]:
        own = [f"train.output_dir={run.folder}", f"train.seed={run.seed}"]
        own += [f"dataset.train.fraction={run.fraction:g}", f"dataset.train.fraction_seed={run.seed}"]
        return own if run.init.checkpoint is None else [*own, f"train.init_checkpoint={run.init.checkpoint}"]

    def check(self, run: Run) -> None:
        """Raises what ``tools/train_det.py`` would refuse of the run's settings, before anything is written."""
        from mae_transfer.detection.config import load_config, resolve  # the framework, when it is needed

        resolve(load_config(self.config_file, self.settings(run)))

    def command(self, run: Run) -> list[str]:
        return [str(TOOLS / "train_det.py"), "--config-file", str(self.config_file), "--resume", *self.settings(run)]

    def is_finished(self, run: Run) -> bool:
        evaluation = run.folder / "evaluation.json"
        if not evaluation.is_file():
            return False
        return bool(json.loads(evaluation.read_text(encoding="utf-8"))["iteration"] >= self._length(run))

    def _length(self, run: Run) -> int:
        """Iterations of a run that has begun."""
        config = run.folder / "config.yaml"
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["max_iter"]) if config.is_file() else 0
