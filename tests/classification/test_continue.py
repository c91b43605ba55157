"""Going on with a classification run: what may be gone by then, what must be as it was, what is never written over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mae_transfer import build_vit
from mae_transfer.checkpoint import describe, write_safetensors
from mae_transfer.classification.cli import main
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.classification.run import check_neighbours
from mae_transfer.engine.metrics import read_metrics
from mae_transfer.errors import ConfigError, run_tool
from tests.classification.small import write_classes
from tests.classification.test_run import Died, arguments
from tests.pretrain.small import timeless


def fresh_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A file of its own, to be deleted; with a norm of its images, an architecture and a licence that go on from it."""
    torch.manual_seed(seed)
    vit = build_vit(size="tiny", width=32, depth=2, num_heads=2, patch_size=8, image_size=32, layer_scale=0.1)
    info = describe(vit, mean=(0.5,) * 3, std=(0.25,) * 3, source="somewhere", license="cc-by-nc-4.0")
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "encoder.safetensors", vit.state_dict(), info.to_metadata())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def whole_file(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata(), load_file(path)


def dies_at(call: int) -> Callable[..., torch.Tensor]:
    """``ClassificationRun.loss`` that is killed when it is called for the ``call``-th time."""
    loss, calls = ClassificationRun.loss, []

    def dies(self: ClassificationRun, *given: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) == call:
            raise Died
        return loss(self, *given)  # type: ignore[arg-type]

    return dies


@pytest.mark.parametrize("protocol", ["finetune", "partial", "linear"])
def test_the_initial_weights_are_not_needed_to_go_on(protocol: str, classes: Path, tmp_path: Path) -> None:
    """Sizes, normalisation, architecture, source and licence included, to the last bit."""
    own = [f"model.{key}=null" for key in ("size", "patch_size", "width", "depth", "num_heads")]
    start = [f"init_checkpoint={fresh_encoder(tmp_path / 'start')}", *own]
    assert run_tool(main, arguments(protocol, classes, tmp_path / "whole", *start)) == 0
    with patch.object(ClassificationRun, "loss", dies_at(6)), pytest.raises(Died):
        main(arguments(protocol, classes, tmp_path / "parts", *start))
    shutil.rmtree(tmp_path / "start")
    assert run_tool(main, arguments(protocol, classes, tmp_path / "parts", *start, "run.resume=auto")) == 0
    ours, theirs = tmp_path / "parts", tmp_path / "whole"
    assert timeless(ours / "metrics.jsonl") == timeless(theirs / "metrics.jsonl")
    assert (ours / "per_class.csv").read_bytes() == (theirs / "per_class.csv").read_bytes()
    for name in ("model", "encoder"):
        one, other = (whole_file(place / f"{name}.safetensors") for place in (ours, theirs))
        assert one[0] == other[0] and one[0]["license"] == "cc-by-nc-4.0"
        assert set(one[1]) == set(other[1]) and all(torch.equal(one[1][key], other[1][key]) for key in other[1])
    elsewhere = arguments(protocol, classes, tmp_path / "elsewhere", *own, f"run.resume={ours}")
    assert run_tool(main, elsewhere) == 0, "nor its name, nor the folder"
    assert timeless(tmp_path / "elsewhere" / "metrics.jsonl") == timeless(theirs / "metrics.jsonl")


def test_other_classes_are_no_continuation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder renamed gives all images another number; a finished run keeps its report too."""
    for part in ("train", "val"):
        write_classes(tmp_path / part)
    command = arguments("finetune", tmp_path, tmp_path / "run", "train.steps=3")
    assert run_tool(main, command) == 0
    before = contents(tmp_path / "run")
    for part in ("train", "val"):
        (tmp_path / part / "class-0").rename(tmp_path / part / "zebra")
    assert run_tool(main, [*command, "run.resume=auto"]) == 2
    assert "no longer has the classes that the run began with: class-0 lacking, zebra new" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_the_folder_of_another_protocol_is_left_alone(
    protocol: str, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished, or killed before its first training state."""
    run = tmp_path / "run"
    assert run_tool(main, arguments("finetune", classes, run, "train.steps=3")) == 0
    for finished in (True, False):
        before = contents(run)
        more = ["knn.k=[1]"] if protocol == "knn" else []
        assert run_tool(main, arguments(protocol, classes, run, *more, "run.resume=auto")) == 2
        assert f"is of a run with protocol=finetune, and this is {protocol}" in capsys.readouterr().err
        assert contents(run) == before
        if finished:
            shutil.rmtree(run / "checkpoints")
            for name in ("model", "encoder"):
                (run / f"{name}.safetensors").unlink()


def test_neighbours_again_replace_their_own_line_only(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"init_checkpoint={fresh_encoder(tmp_path / 'start')}"
    command = arguments("knn", classes, tmp_path / "run", start, "knn.k=[1,5]", "run.resume=auto")
    assert run_tool(main, command) == 0
    once = timeless(tmp_path / "run" / "metrics.jsonl")
    assert run_tool(main, command) == 0
    assert timeless(tmp_path / "run" / "metrics.jsonl") == once and len(once) == 1
    before = contents(tmp_path / "run")
    other = f"init_checkpoint={fresh_encoder(tmp_path / 'other', seed=1)}"
    assert run_tool(main, [*command, other]) == 2
    assert "init_checkpoint was" in capsys.readouterr().err
    assert run_tool(main, arguments("finetune", classes, tmp_path / "run", "run.resume=auto")) == 2
    assert "is of a run with protocol=knn" in capsys.readouterr().err
    assert run_tool(main, [*command, f"run.resume={tmp_path / 'run'}"]) == 2
    assert "protocol=knn has no training state to go on from" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_report_that_fails_costs_no_weights(classes: Path, tmp_path: Path) -> None:
    command = arguments("finetune", classes, tmp_path / "run", "train.steps=3")
    with patch("mae_transfer.classification.run.write_report", side_effect=Died), pytest.raises(Died):
        main(command)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert run_tool(main, [*command, "run.resume=auto"]) == 0
    assert len(json.loads((tmp_path / "run" / "classes.json").read_text())) == 4
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_more_neighbours_than_images_are_refused_at_once(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch("mae_transfer.classification.run.run_knn", side_effect=AssertionError("nothing is encoded")):
        assert run_tool(main, arguments("knn", classes, tmp_path / "run")) == 2
    assert "knn.k=[10, 20, 100] asks up to 100 neighbours, and data.train has 24 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for ks, advice in (([10, 20, 100], "knn.k=[10,20],"), ([50], "knn.k=[24],")):
        with pytest.raises(ConfigError, match=r"set " + advice.replace("[", r"\[").replace("]", r"\]")):
            check_neighbours(ks, 24)
