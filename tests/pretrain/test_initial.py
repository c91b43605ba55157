"""Pretraining that starts from weights: what is taken, what stays, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_transfer.checkpoint import encoder_state
from mae_transfer.errors import CheckpointError, run_tool
from pretrain import MaskedAutoencoder, build_mae
from pretrain.cli import main
from pretrain.load import load_initial_weights
from tests.pictures import write_pictures
from tests.pretrain.small import timeless
from tests.pretrain.test_run import arguments


def small(seed: int, **changes: object) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    numbers = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "num_heads": 2}
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    return build_mae(size="tiny", **{**numbers, **decoder, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    pictures = write_pictures(folder / "pictures", 12)
    assert run_tool(main, arguments(pictures, folder / "run", "train.steps=3")) == 0
    return folder / "run"


def test_a_run_starts_from_another_runs_weights(run: Path, tmp_path: Path) -> None:
    still = ("train.steps=1", "optim.base_lr=1e-30", "optim.weight_decay=0", "optim.warmup_epochs=0")
    more = (*still, "run.seed=7", f"init_checkpoint={run}")
    assert run_tool(main, arguments(run.parent / "pictures", tmp_path / "run", *more)) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-20) for name in before)


def test_a_run_that_goes_on_needs_the_weights_no_more(run: Path, tmp_path: Path) -> None:
    pictures, weights = run.parent / "pictures", tmp_path / "weights.safetensors"
    weights.write_bytes((run / "model.safetensors").read_bytes())
    long = ("train.steps=6", f"init_checkpoint={weights}")
    assert run_tool(main, arguments(pictures, tmp_path / "whole", *long)) == 0
    half = tmp_path / "whole" / "checkpoints" / "step-00000003.pt"
    weights.unlink()
    more = ("train.steps=6", f"run.resume={half}")
    assert run_tool(main, arguments(pictures, tmp_path / "half", *more)) == 0
    assert timeless(tmp_path / "half" / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")


def test_without_a_decoder_only_the_encoder_is_taken(run: Path) -> None:
    model, fresh = small(1, decoder_depth=3), small(1, decoder_depth=3).state_dict()
    assert "no decoder" in load_initial_weights(model, run / "encoder.safetensors")
    given, own = load_file(run / "encoder.safetensors"), model.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in encoder_state(own))
    assert all(torch.equal(own[name], fresh[name]) for name in own if name not in encoder_state(own))


def test_fixed_positions_are_those_of_the_new_grid(run: Path) -> None:
    model = small(1, image_size=(16, 24))
    load_initial_weights(model, run)
    fresh = small(2, image_size=(16, 24)).state_dict()
    assert torch.equal(model.pos_embed, fresh["pos_embed"])
    assert torch.equal(model.decoder_pos_embed, fresh["decoder_pos_embed"])
    assert torch.equal(model.decoder_pred.weight, load_file(run / "model.safetensors")["decoder_pred.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 64}, "shape"),
        ({"decoder_depth": 2}, "decoder_blocks.1"),
        ({"depth": 1}, "blocks.1"),
        ({"positions": "learned"}, "model.positions=sincos"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_taken(run: Path, changes: dict[str, object], said: str) -> None:
    model = small(1, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        load_initial_weights(model, run)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_file_is_not_needed_to_go_on(run: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    start.write_bytes((run / "model.safetensors").read_bytes())
    pictures, more = run.parent / "pictures", (f"init_checkpoint={start}", "train.steps=5")
    assert run_tool(main, arguments(pictures, tmp_path / "whole", *more)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "step-00000005.pt").unlink()  # killed after the third step
    start.unlink()
    assert run_tool(main, arguments(pictures, tmp_path / "parts", *more, "run.resume=auto")) == 0
    assert timeless(tmp_path / "parts" / "metrics.jsonl") == timeless(tmp_path / "whole" / "metrics.jsonl")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_missing_file_leaves_no_folder(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ("train.steps=3", "init_checkpoint=nothing.safetensors")
    assert run_tool(main, arguments(run.parent / "pictures", tmp_path / "run", *more)) == 2
    assert "nothing.safetensors" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
