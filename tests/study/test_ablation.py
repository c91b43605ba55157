"""The small-scale study of the paper's axes: what is trained, in what order, and what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mae_transfer.engine.config import read_config
from mae_transfer.errors import run_tool
from mae_transfer.study.ablation import Study, read_cells, write_results
from mae_transfer.study.ablation_cli import main
from mae_transfer.study.axes import AXES, DEPTH, FINETUNE, LINEAR, SCRATCH
from mae_transfer.study.results import Cell, findings, markdown
from pretrain.config import PretrainConfig
from pretrain.model import build_mae

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def study(out: Path, **changes: object) -> Study:
    fields: dict[str, object] = {
        "out": out,
        "images": Path("images"),
        "train": Path("train"),
        "val": Path("val"),
        "pretrain_config": CONFIGS / "pretrain" / "study.yaml",
        "classify_configs": CONFIGS / "classification",
    }
    return Study(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", AXES.values(), ids=list(AXES))
def test_the_rows_of_an_axis_change_the_pretraining_in_what_they_say(axis: object, tmp_path: Path) -> None:
    assert axis in AXES.values()
    own = study(tmp_path)
    own.check(axis)  # type: ignore[arg-type]
    configs = {}
    for row in axis.rows:  # type: ignore[attr-defined]
        _, file, *settings = own.pretraining(row.pretraining, 3).command()
        config = read_config(PretrainConfig, file, settings)
        assert config.run.seed == 3
        configs[row.pretraining.name] = (config.mask, config.model)
    names = {row.pretraining.name for row in axis.rows}  # type: ignore[attr-defined]
    assert len({str(config) for config in configs.values()}) == len(names)  # no two names mean the same


def test_the_study_trains_an_encoder_of_the_depth_that_partial_fine_tuning_counts() -> None:
    config = read_config(PretrainConfig, CONFIGS / "pretrain" / "study.yaml")
    assert config.model.depth == DEPTH
    assert build_mae(**config.model_arguments).blocks[-1] is not None


def test_the_rows_stand_beside_the_papers_numbers() -> None:
    # RECIPES: Table 1 and Figure 5 and 9 of the paper, ViT-L.
    def paper(axis: str) -> dict[str, tuple[float | None, ...]]:
        columns = AXES[axis].columns
        return {row.label: tuple(row.paper.get(column) for column in columns) for row in AXES[axis].rows}

    assert paper("ratio") == {
        "10 %": (None, 54.6),
        "25 %": (None, None),
        "50 %": (None, None),
        "75 %": (84.9, 73.5),
    } | {"90 %": (None, None)}
    assert list(paper("masking").values()) == [(84.9, 73.5), (83.9, 72.3), (82.8, 63.9), (84.0, 66.0)]
    assert list(paper("target").values()) == [(84.9, 73.5), (85.4, 73.9)]
    assert paper("decoder")["mask tokens in the encoder"] == (84.2, 59.6)
    assert paper("decoder")["1 block"] == (84.8, 65.5) and paper("decoder")["4 blocks"] == (84.4, 73.3)
    assert [value for (value,) in paper("partial").values() if value is not None] == [73.5, 81.0, 84.9]


def test_axes_share_what_they_have_in_common_and_nothing_starts_before_what_it_needs(tmp_path: Path) -> None:
    own = study(tmp_path)
    jobs = own.jobs(AXES["masking"], [0, 1])
    folders = [job.folder for job in jobs]
    assert len(folders) == len(set(folders)) == 2 * (4 + 4 * 2 + 2)  # pretrained; judged twice; random weights
    for place, job in enumerate(jobs):
        assert all(before.folder in folders[:place] for before in job.after)
    common = {job.folder for job in own.jobs(AXES["ratio"], [0])} & set(folders)
    names = {str(folder.relative_to(tmp_path)) for folder in common}
    assert names == {
        *("pretrain/random-75/seed-0", "finetune/random-75/seed-0", "linear/random-75/seed-0"),
        *("finetune/scratch/seed-0", "linear/scratch/seed-0"),
    }


def test_a_start_from_random_weights_is_told_the_size_of_the_pretrained_one(tmp_path: Path) -> None:
    own = study(tmp_path, pretrain_settings=("model.width=64",))
    row = AXES["target"].rows[0]
    command = own.evaluation(None, row.evaluations[LINEAR], 0).command()
    assert {"model.size=tiny", "model.width=64", "model.depth=6", "model.num_heads=4", "model.patch_size=[4, 4]"} <= {
        *command
    }
    command = own.evaluation(row.pretraining, row.evaluations[LINEAR], 0).command()
    encoder = tmp_path / "pretrain/random-75/seed-0/encoder.safetensors"
    assert f"init_checkpoint={encoder}" in command and str(CONFIGS / "classification" / "study_linear.yaml") in command


def cells(**rows: list[float]) -> dict[tuple[str, str], Cell]:
    return {(label, LINEAR): Cell(values=tuple(values)) for label, values in rows.items()}


def test_what_agrees_with_the_paper_is_said_and_what_does_not() -> None:
    axis = AXES["masking"]
    found = cells(
        **{"random 75 %": [5.0, 5.2], "block 50 %": [4.0, 4.2], "block 75 %": [6.0, 7.0], "grid 75 %": [5.1, 4]}
    )
    assert findings(axis, found) == [
        "linear, block 50 % against random 75 %: -1.00 here, -1.2 in the paper: agrees, beyond the spread of the seeds",
        "linear, block 75 % against random 75 %: +1.40 here, -9.6 in the paper: disagrees, "
        "beyond the spread of the seeds",
        "linear, grid 75 % against random 75 %: -0.55 here, -7.5 in the paper: the seeds overlap",
    ]
    one = cells(**{"random 75 %": [5.0], "block 50 %": [4.0]})
    assert findings(axis, one) == [
        "linear, block 50 % against random 75 %: -1.00 here, -1.2 in the paper: the same order, of one seed each"
    ]
    same = {(label, FINETUNE): Cell(values=(value,)) for label, value in (("2 blocks, 64 wide", 5.0), ("32 wide", 4.0))}
    (line,) = findings(AXES["decoder"], same)
    assert line.endswith("the paper finds no difference")


def test_the_table_has_mean_deviation_and_range() -> None:
    values = [5.0, 5.5, 4.75]
    text = markdown(AXES["masking"], {**cells(**{"random 75 %": values, SCRATCH: [3.0]})})
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    assert f"| random 75 % |  | {mean:.2f} ± {deviation:.2f} [4.75–5.50] | 84.9 | 73.5 |" in text
    assert f"| {SCRATCH} |  | 3.00 |  |  |" in text
    assert "block" not in text


def finish(own: Study, axis: str, top1: float) -> None:
    """Every evaluation of an axis as if it had ended."""
    for number, job in enumerate(own.jobs(AXES[axis], [0, 1])):
        job.folder.mkdir(parents=True)
        if job.after or "scratch" in job.folder.parts:
            (job.folder / "model.safetensors").touch()
            lines = [
                {"step": 1, "val_top1": 0.0},
                {"step": 2, "val_top1": top1 + number / 10},
                {"step": 3, "loss": 1.0},
            ]
            (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", ["ratio", "masking", "partial"])
def test_what_is_finished_becomes_a_table_numbers_and_a_picture(name: str, tmp_path: Path) -> None:
    own, axis = study(tmp_path), AXES[name]
    finish(own, name, 5.0)
    text = write_results(own, axis, [0, 1])
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == text
    found = read_cells(own, axis, [0, 1])
    assert len(found) == (len(axis.rows) + 1) * len(axis.columns)
    assert all(len(cell.values) == 2 and min(cell.values) >= 5 for cell in found.values())
    content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert {(entry["row"], entry["column"]): tuple(entry["values"]) for entry in content} == {
        key: cell.values for key, cell in found.items()
    }
    picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


BAD = [
    (["--images", "missing"], "--images missing does not exist"),
    (["--seeds", "1", "1"], "--seeds has a value twice"),
    (["--jobs", "0"], "at least 1"),
    (["--pretrain-config", "missing.yaml"], "--pretrain-config: missing.yaml does not exist"),
    (["--classify-configs", "missing"], "--classify-configs: missing/study_finetune.yaml does not exist"),
    (["--pretrain-set", "mask.rato=0.5"], "did you mean mask.ratio"),
    (["--classify-set", "optim.bas_lr=0.5"], "did you mean optim.base_lr"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input_is_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [word for key in ("images", "train", "val") for word in (f"--{key}", str(tmp_path))]
    assert run_tool(main, ["ratio", *folders, "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [word for key in ("images", "train", "val") for word in (f"--{key}", str(tmp_path))]
    command = ["target", *folders, "--out", str(tmp_path / "out"), "--results"]
    assert run_tool(main, command) == 0
    assert "No run is finished yet" in capsys.readouterr().out
    assert run_tool(main, [*command, "--pretrain-set", "train.epochs=1"]) == 2
    assert "holds another study: pretrain_settings was [], is ['train.epochs=1']" in capsys.readouterr().err


@pytest.mark.slow
def test_an_axis_from_pretraining_to_its_table(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part in ("images/all", "train/a", "train/b", "val/a", "val/b"):
        (tmp_path / part).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 255, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{number}.png")
    folders = [word for key in ("images", "train", "val") for word in (f"--{key}", str(tmp_path / key))]
    small = ["train.epochs=2", "train.batch_size=8", "optim.warmup_epochs=0"]
    settings = [word for what in ("pretrain", "classify") for value in small for word in (f"--{what}-set", value)]
    command = [sys.executable, str(ROOT / "tools" / "study.py"), "target", *folders, "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "| pixels |" in done.stdout and "| normalised pixels |" in done.stdout and "| random weights |" in done.stdout
    )
    content = json.loads((tmp_path / "out" / "target.json").read_text(encoding="utf-8"))
    assert len(content) == 3 * 2 and all(0 <= value <= 100 for entry in content for value in entry["values"])
    config = yaml.safe_load((tmp_path / "out" / "linear" / "normalised" / "seed-0" / "config.yaml").read_text())
    assert config["protocol"] == "linear" and config["model"]["width"] == 128
    again = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "8 of 8 runs are finished already" in again.stderr
    assert again.stdout == done.stdout
