"""An axis of the paper's study at small scale: its trainings in order, and the files that say what came of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mae_transfer.engine.config import read_config, to_dict
from mae_transfer.engine.files import write_text
from mae_transfer.study.axes import BASELINE, EVALUATIONS, SCRATCH, Axis, Evaluation, Pretraining, Row, rows_of
from mae_transfer.study.figure import draw
from mae_transfer.study.jobs import TOOLS, Job
from mae_transfer.study.results import Cell, markdown


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where its trainings are and what they share.

    Args:
        out: folder of the study; trainings that axes have in common are made once.
        images: the unlabelled images that all pretrainings see.
        train, val: labelled images, a folder a class.
        pretrain_config: the file that the axes change.
        classify_configs: the folder of the files by which a pretraining is judged.
        pretrain_settings, classify_settings: ``section.key=value`` over those files, for every training.
    """

    out: Path
    images: Path
    train: Path
    val: Path
    pretrain_config: Path
    classify_configs: Path
    pretrain_settings: tuple[str, ...] = ()
    classify_settings: tuple[str, ...] = ()

    def check(self, axis: Axis) -> None:
        """Raises UserError for what a training would refuse of its settings, before any is started."""
        from mae_transfer.classification.config import ClassificationConfig  # sibling rooms, when they are needed
        from pretrain.config import PretrainConfig

        for row in rows_of(axis):
            if row.pretraining is not None:
                file, *settings = self._pretrain_arguments(row.pretraining, 0, self.out)
                read_config(PretrainConfig, file, settings)
            for how in row.evaluations.values():
                read_config(
                    ClassificationConfig, self.classify_configs / how.config, [*self.classify_settings, *how.settings]
                )

    @property
    def definition(self) -> dict[str, Any]:
        """What all trainings below ``out`` have in common."""
        fields = {name: str(getattr(self, name)) for name in ("images", "train", "val")}
        return {
            **fields,
            "pretrain_config": yaml.safe_load(self.pretrain_config.read_text(encoding="utf-8")),
            **{
                how.config: yaml.safe_load((self.classify_configs / how.config).read_text(encoding="utf-8"))
                for how in EVALUATIONS
            },
            "pretrain_settings": sorted(self.pretrain_settings),
            "classify_settings": sorted(self.classify_settings),
        }

    def pretraining(self, what: Pretraining, seed: int) -> Job:
        folder = self.out / "pretrain" / what.name / f"seed-{seed}"
        return Job(
            title=f"pretraining {what.name}, seed {seed}",
            folder=folder,
            command=lambda: [str(TOOLS / "pretrain.py"), *self._pretrain_arguments(what, seed, folder)],
            is_finished=(folder / "encoder.safetensors").is_file,
        )

    def _pretrain_arguments(self, what: Pretraining, seed: int, folder: Path) -> list[str]:
        own = [f"data.path={self.images}", f"run.dir={folder}", f"run.seed={seed}", "run.resume=auto"]
        return [str(self.pretrain_config), *self.pretrain_settings, *what.settings, *own]

    def evaluation_folder(self, what: Pretraining | None, how: Evaluation, seed: int) -> Path:
        return self.out / how.name / ("scratch" if what is None else what.name) / f"seed-{seed}"

    def evaluation(self, what: Pretraining | None, how: Evaluation, seed: int) -> Job:
        folder = self.evaluation_folder(what, how, seed)
        first = None if what is None else self.pretraining(what, seed)
        start = self._same_model if first is None else (f"init_checkpoint={first.folder / 'encoder.safetensors'}",)
        own = [f"data.train={self.train}", f"data.val={self.val}", f"run.dir={folder}", f"run.seed={seed}"]
        arguments = [
            str(self.classify_configs / how.config),
            *self.classify_settings,
            *how.settings,
            *start,
            *own,
            "run.resume=auto",
        ]
        return Job(
            title=f"{how.name} of {SCRATCH if what is None else what.name}, seed {seed}",
            folder=folder,
            command=lambda: [str(TOOLS / "train_cls.py"), *arguments],
            is_finished=(folder / "model.safetensors").is_file,
            after=[] if first is None else [first],
        )

    @cached_property
    def _same_model(self) -> tuple[str, ...]:
        """What a start from random weights has to be told that a checkpoint says itself."""
        from pretrain.config import PretrainConfig  # a sibling room, when its config is needed

        arguments = self._pretrain_arguments(BASELINE, 0, self.out)
        model = to_dict(read_config(PretrainConfig, arguments[0], arguments[1:]).resolved())["model"]
        keys = ("size", "patch_size", "width", "depth", "num_heads")
        return tuple(f"model.{key}={json.dumps(model[key]).strip(chr(34))}" for key in keys)

    def jobs(self, axis: Axis, seeds: Sequence[int]) -> list[Job]:
        """Every training of an axis once, seed by seed: an interrupted axis compares too."""
        found: dict[Path, Job] = {}
        for seed in seeds:
            for row in rows_of(axis):
                for how in row.evaluations.values():
                    job = self.evaluation(row.pretraining, how, seed)
                    for one in (*job.after, job):
                        found.setdefault(one.folder, one)
        return list(found.values())

    def result(self, row: Row, column: str, seed: int) -> float | None:
        """Top-1 in per cent of a finished evaluation."""
        how = row.evaluations[column]
        if not self.evaluation(row.pretraining, how, seed).is_finished():
            return None
        folder = self.evaluation_folder(row.pretraining, how, seed)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return float([values["val_top1"] for values in map(json.loads, lines) if "val_top1" in values][-1])


def read_cells(study: Study, axis: Axis, seeds: Sequence[int]) -> dict[tuple[str, str], Cell]:
    """What is finished."""
    cells = {}
    for row in rows_of(axis):
        for column in axis.columns:
            values = [study.result(row, column, seed) for seed in seeds]
            if known := tuple(value for value in values if value is not None):
                cells[row.label, column] = Cell(values=known)
    return cells


def write_results(study: Study, axis: Axis, seeds: Sequence[int]) -> str:
    """``AXIS.md``, ``AXIS.json`` and ``AXIS.png`` of what is finished; returns the first's text."""
    cells = read_cells(study, axis, seeds)
    text = markdown(axis, cells)
    write_text(study.out / f"{axis.name}.md", text)
    content = [{"row": row, "column": column, "values": cell.values} for (row, column), cell in cells.items()]
    write_text(study.out / f"{axis.name}.json", json.dumps(content, indent=1) + "\n")
    if cells:
        draw(axis, cells, study.out / f"{axis.name}.png")
    return text
