"""UperNet as the task of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mae_transfer.checkpoint import EncoderInfo
from mae_transfer.study.compare import Run
from mae_transfer.study.jobs import TOOLS
from mae_transfer.study.transfer import TransferTask, list_option


class SegmentationTask(TransferTask):
    """Trainings by ``tools/train_seg.py``."""

    metrics: ClassVar[Mapping[str, str]] = {"mIoU": "mIoU"}
    ours = ("train.seed", "init_checkpoint", "dataset.fraction", "dataset.fraction_seed")
    step_key = "step"
    _max_iters: int | None = None

    def facts(self, info: EncoderInfo) -> dict[str, Any]:
        return {
            "encoder.patch_size": info.patch_size[0],
            "model.data_preprocessor.mean": list_option(255 * value for value in info.mean),
            "model.data_preprocessor.std": list_option(255 * value for value in info.std),
        }

    def own(self, run: Run) -> list[str]:
        own = [f"train.seed={run.seed}", f"dataset.fraction={run.fraction:g}", f"dataset.fraction_seed={run.seed}"]
        return own if run.init.checkpoint is None else [*own, f"init_checkpoint={run.init.checkpoint}"]

    def check(self, run: Run) -> None:
        """Raises what ``tools/train_seg.py`` would refuse of settings and data, before anything is written."""
        from mae_transfer.segmentation.train import check_folder_of  # the framework, when it is needed

        config = self._config(run)
        for split in ("train", "val"):
            check_folder_of(config, split)

    def command(self, run: Run) -> list[str]:
        tool = [str(TOOLS / "train_seg.py"), str(self.config_file), "--work-dir", str(run.folder), "--resume"]
        return [*tool, "--cfg-options", *self.settings(run)]

    def is_finished(self, run: Run) -> bool:
        curve = self.curves(run)["mIoU"]
        if not curve:
            return False
        if self._max_iters is None:  # the same for all runs; asked for often
            self._max_iters = self._config(run).settings.train.max_iters
        return curve[-1][0] >= self._max_iters

    def _config(self, run: Run) -> Any:
        from mae_transfer.segmentation.config import load_config, read_options

        return load_config(self.config_file, read_options(self.settings(run)), work_dir=str(run.folder))
