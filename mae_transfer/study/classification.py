"""Classification as the task of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import yaml

from mae_transfer.checkpoint import EncoderInfo
from mae_transfer.study.compare import Run
from mae_transfer.study.jobs import TOOLS
from mae_transfer.study.transfer import TransferTask, list_option


class ClassificationTask(TransferTask):
    """Trainings by ``tools/train_cls.py``, of whichever protocol the config says."""

    metrics: ClassVar[Mapping[str, str]] = {"val_top1": "top-1", "val_top5": "top-5"}
    metrics_file: ClassVar[str] = "metrics.jsonl"
    ours = (
        *("run.seed", "run.dir", "run.resume", "run.overwrite", "init_checkpoint"),
        *("data.fraction", "data.fraction_seed"),
    )
    step_key = "step"

    def facts(self, info: EncoderInfo) -> dict[str, Any]:
        from mae_transfer.classification.config import other_arguments  # that room, when it is needed

        return {
            "model.size": info.size,
            "model.patch_size": f"[{info.patch_size[0]},{info.patch_size[1]}]",
            "model.width": info.width,
            "model.depth": info.depth,
            "model.num_heads": info.num_heads,
            "model.architecture": json.dumps(other_arguments(info)),
            "model.pooled_norm": json.dumps(info.pooled_norm and not info.final_norm),
            "data.channels": info.channels,
            "data.mean": list_option(info.mean),
            "data.std": list_option(info.std),
        }

    def own(self, run: Run) -> list[str]:
        own = [f"run.dir={run.folder}", f"run.seed={run.seed}", "run.resume=auto"]
        own += [f"data.fraction={run.fraction:g}", f"data.fraction_seed={run.seed}"]
        return own if run.init.checkpoint is None else [*own, f"init_checkpoint={run.init.checkpoint}"]

    def check(self, run: Run) -> None:
        """Raises what ``tools/train_cls.py`` would refuse of the run's settings, before anything is written."""
        from mae_transfer.classification.config import ClassificationConfig  # that room, when it is needed
        from mae_transfer.engine.config import read_config

        read_config(ClassificationConfig, self.config_file, self.settings(run))

    def command(self, run: Run) -> list[str]:
        return [str(TOOLS / "train_cls.py"), str(self.config_file), *self.settings(run)]

    def is_finished(self, run: Run) -> bool:
        config = run.folder / "config.yaml"
        if not config.is_file() or not (run.folder / "per_class.csv").is_file():
            return False
        protocol = yaml.safe_load(config.read_text(encoding="utf-8"))["protocol"]
        return protocol == "knn" or (run.folder / "model.safetensors").is_file()  # neighbours leave no weights
