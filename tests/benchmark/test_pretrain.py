"""tools/benchmark.py pretrain and masking at a size of seconds: what they print and count, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_transfer.benchmark.cli import main
from mae_transfer.benchmark.peers import check_same_loss, hugging_face, hugging_face_keys
from mae_transfer.benchmark.pretrain import Setting, Step, generate_images, literal_batches, our_batches
from mae_transfer.errors import ConfigError, RunFailed
from pretrain import build_mae
from tests.oracles import hf_keys

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--size", "tiny", "--image-size", "32", "--patch-size", "8", "--threads", "1"]


def small(**other) -> Setting:
    return Setting(size="tiny", image_size=32, patch_size=8, batch_size=4, **other)


def test_pretrain_prints_ratios_and_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "tools/benchmark.py", "pretrain", *SMALL, "--batch-size", "4", "--rounds", "2"]
    names = ["ours-bf16", "hf-bf16"]
    done = subprocess.run(
        [*command, "--contestants", *names, "--json", str(out)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "ours-bf16 is faster by" in done.stdout and "% of matrix products, bf16" in done.stdout
    results = json.loads(out.read_text())["results"]
    assert [result["batch_size"] for result in results] == [4]
    for result in results:
        assert all(len(result["seconds"][name]) == 2 for name in [*names, "matrix products, bf16"])
    assert results[0]["flops"]["ours-bf16"] == small().flops()


def test_masking_counts_what_it_saves(capsys) -> None:
    arguments = ["--size", "tiny", "--image-size", "64", "--batch-size", "2", "--rounds", "1", "--threads", "1"]
    assert main(["masking", *arguments, "--decoder-depth", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("decoder depth 1")
    # 4 of 16 patches and cls, 17 tokens against 5, in an encoder that is nearly all of the work.
    assert 2.5 < float(line.split()[-1]) < 3.4


def test_counted_operations_are_those_that_torch_counts() -> None:
    setting = small()
    step = Step(setting, peer=False, precision="bf16", keep=False)
    step.set_up()
    with FlopCounterMode(display=False) as counter:
        step.turn()
    assert step.flops == setting.flops() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_product_shapes_are_the_models() -> None:
    # 16 patches, 4 visible: 5 tokens an image in the encoder, 17 in the decoder.
    assert small().product_shapes() == [(20, 192, 768), (20, 768, 192), (68, 128, 512), (68, 512, 128)]


def test_the_peer_computes_the_same_or_is_refused() -> None:
    mae = build_mae(size="tiny", image_size=32, patch_size=8, depth=2, decoder_depth=1)
    assert hugging_face_keys(mae.state_dict()).keys() == hf_keys(mae.state_dict()).keys()
    peer = hugging_face(mae)
    with torch.no_grad():
        next(p for name, p in peer.named_parameters() if name.endswith("decoder_pred.bias")).add_(0.1)
    with pytest.raises(RunFailed, match="not the same computation"):
        check_same_loss(mae, peer)


def test_both_loaders_give_normalised_batches_of_the_same_size(tmp_path: Path) -> None:
    generate_images(tmp_path, count=6, side=48)
    setting = small(data=str(tmp_path))
    ours, noise = next(our_batches(setting, setting.model()))
    theirs, _ = next(literal_batches(setting))
    assert ours.shape == theirs.shape == (4, 3, 32, 32) and noise.shape == (4, 16)
    assert ours.dtype == theirs.dtype == torch.float32
    for images in (ours, theirs):
        assert images.abs().max() < 3  # normalised by ImageNet's mean and deviation


@pytest.mark.parametrize("wrong", [["pretrain", "--rounds", "0"], ["masking", "--batch-size", "0"]])
def test_counts_below_one_are_refused(wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        main(wrong)
