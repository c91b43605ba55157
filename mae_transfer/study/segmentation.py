"""UperNet from several initial encoders: how ``tools/compare_inits.py segmentation`` trains and reads a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

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
_OURS = ("train.seed", "init_checkpoint", "dataset.fraction", "dataset.fraction_seed")


class SegmentationTask:
    """Trainings by ``tools/train_seg.py``.

    What a random start would otherwise take from no checkpoint (patch size, mean and deviation of the images) it is
    given from the first start that has one, so that the weights are all that differs. The seed draws the heads'
    weights, the order of the images, their crops, and which images are labelled.

    Raises:
        ConfigError: an override of what the comparison sets.
    """

    metrics: ClassVar[Mapping[str, str]] = {"mIoU": "mIoU"}

    def __init__(self, config_file: Path, overrides: Sequence[str], inits: Sequence[Init]) -> None:
        refuse_overrides(overrides, _OURS)
        self.config_file = config_file
        self.overrides = list(overrides)
        given = {override.partition("=")[0] for override in overrides}
        info = first_encoder(inits)
        facts: dict[str, Any] = {}
        if info is not None:
            facts = {
                "encoder.patch_size": info.patch_size[0],
                "model.data_preprocessor.mean": list_option(255 * value for value in info.mean),
                "model.data_preprocessor.std": list_option(255 * value for value in info.std),
            }
        self.shared = [f"{key}={value}" for key, value in facts.items() if key not in given]

    def check(self, run: Run) -> None:
        """Raises what ``tools/train_seg.py`` would refuse of settings and data, before anything is written."""
        from mae_transfer.segmentation.train import check_folder_of  # the framework, when it is needed

        config = self._config(run)
        for split in ("train", "val"):
            check_folder_of(config, split)

    def command(self, run: Run) -> list[str]:
        tool = [str(TOOLS / "train_seg.py"), str(self.config_file), "--work-dir", str(run.folder), "--resume"]
        return [*tool, "--cfg-options", *self.settings(run)]

    def settings(self, run: Run) -> list[str]:
        """Options of the config."""
        own = [f"train.seed={run.seed}", f"dataset.fraction={run.fraction:g}", f"dataset.fraction_seed={run.seed}"]
        if run.init.checkpoint is not None:
            own.append(f"init_checkpoint={run.init.checkpoint}")
        return [*self.overrides, *self.shared, *own]

    def curves(self, run: Run) -> dict[str, Curve]:
        return read_curves(run.folder / "metrics.json", self.metrics, step="step")

    def is_finished(self, run: Run) -> bool:
        curve = self.curves(run)["mIoU"]
        return bool(curve) and curve[-1][0] >= self._config(run).settings.train.max_iters

    def _config(self, run: Run) -> Any:
        from mae_transfer.segmentation.config import load_config, read_options

        return load_config(self.config_file, read_options(self.settings(run)), work_dir=str(run.folder))
