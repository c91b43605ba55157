"""Training in the framework itself: bf16, kill and resume, overfitting, testing, predicting, and its mistakes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, DefaultScope
from mmseg.registry import MODELS
from PIL import Image

from mae_transfer.checkpoint import describe, read_checkpoint, write_safetensors
from mae_transfer.engine.metrics import read_metrics
from mae_transfer.errors import CheckpointError, ConfigError, RunFailed, UserError, run_tool
from mae_transfer.predict import main as predict_main
from mae_transfer.segmentation.config import load_config, read_options
from mae_transfer.segmentation.runner import read_weights
from mae_transfer.segmentation.test import main as run_test_tool
from mae_transfer.segmentation.train import main as train_main
from mae_transfer.segmentation.train import refuse_used_folder, train
from mae_transfer.vit import build_vit

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/segmentation/upernet_tiny.py")
SMALL = (
    "dataset.crop_size=32",
    "dataset.resize=(80,32)",
    "dataset.workers=0",
    "dataset.reduce_zero_label=False",
    "head.channels=16",
    "head.aux_channels=16",
    "train.batch_size=2",
    "train.log_interval=1",
)

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def arguments(folder: Path, work_dir: Path, *options: str, flags: tuple[str, ...] = ()) -> list[str]:
    return [
        CONFIG,
        "--work-dir",
        str(work_dir),
        *flags,
        "--cfg-options",
        f"dataset.root={folder}",
        *SMALL,
        *options,
    ]


def losses(work_dir: Path) -> dict[int, float]:
    """Loss by iteration."""
    return {line["step"]: line["loss"] for line in read_metrics(work_dir / "metrics.json") if "loss" in line}


def timeless(work_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.json without what a clock has put into them."""
    lines = read_metrics(work_dir / "metrics.json")
    return [{name: value for name, value in line.items() if not name.endswith("time")} for line in lines]


@HOOKS.register_module()
class DtypeProbe(Hook):
    """Notes the dtype inside the encoder, the pyramid and the head in the first iteration."""

    seen: dict[str, torch.dtype] = {}  # noqa: RUF012 - read by the test

    def before_train(self, runner) -> None:
        model = runner.model
        for name, module in (
            ("encoder", model.backbone.blocks[3].mlp.fc1),
            ("pyramid", model.neck.levels[0]),
            ("head", model.decode_head.conv_seg),
        ):
            module.register_forward_hook(lambda m, a, out, name=name: self.seen.__setitem__(name, out.dtype))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_on_in_training(make_folder, tmp_path, precision: str, dtype: torch.dtype) -> None:
    options = {
        "dataset.root": str(make_folder()),
        "dataset.crop_size": 32,
        "dataset.workers": 0,
        "dataset.reduce_zero_label": False,
        "head.channels": 16,
        "train.max_iters": 1,
        "train.batch_size": 2,
        "train.precision": precision,
    }
    config = load_config(CONFIG, options, work_dir=str(tmp_path / "run"))
    config.custom_hooks.append({"type": "DtypeProbe"})
    config.val_dataloader = config.val_cfg = config.val_evaluator = None
    config.default_hooks.checkpoint.save_best = None
    runner = train(config)
    assert DtypeProbe.seen == {"encoder": dtype, "pyramid": dtype, "head": dtype}
    assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}


def test_train_test_predict_from_a_pretrained_encoder(make_folder, tmp_path, capsys) -> None:
    """The chain as a user calls it, with everything it leaves behind."""
    folder, run = make_folder(), tmp_path / "run"
    encoder = build_vit("tiny", patch_size=8, image_size=32)
    source = tmp_path / "encoder.safetensors"
    write_safetensors(source, encoder.state_dict(), describe(encoder).to_metadata())
    options = (f"init_checkpoint={source}", "train.max_iters=4", "train.val_interval=4", "train.lr=1e-9")
    assert train_main(arguments(folder, run, *options)) == 0
    assert "trained 4 iterations, best mIoU" in capsys.readouterr().out
    assert {path.name for path in (run / "predictions").iterdir()} == {"scene_0.png", "scene_1.png"}
    assert Image.open(run / "predictions/scene_0.png").size[0] >= 3 * 80 + 2 * 6
    log = next(run.glob("*/*.log")).read_text()
    assert "loaded" in log and "missing" in log and "relative_position_bias_table (12)" in log
    assert len(list(run.glob("tensorboard/events.out.tfevents.*"))) == 1
    weights = read_weights(run / "iter_4.pth")
    torch.testing.assert_close(weights["backbone.cls_token"], encoder.cls_token.detach(), atol=1e-6, rtol=1e-4)
    saved = read_checkpoint(run / "iter_4.pth")  # with the curves and arrays that MMEngine keeps in it
    assert saved.family == "mmseg" and torch.equal(saved.tensors["cls_token"], weights["backbone.cls_token"])

    # Tested where the encoder file is gone, by the dumped config.
    source.unlink()
    flags = ["--out", str(tmp_path / "labels"), "--show-dir", str(tmp_path / "overlays")]
    assert run_test_tool([str(run / "upernet_tiny.py"), str(run / "iter_4.pth"), *flags]) == 0
    assert "mIoU" in capsys.readouterr().out
    for where in ("labels", "overlays"):
        assert {path.name for path in (tmp_path / where).iterdir()} == {"scene_0.png", "scene_1.png"}
    assert np.asarray(Image.open(tmp_path / "labels/scene_0.png")).shape == (64, 80)

    images = [str(folder / "images/validation/scene_0.png"), str(folder / "images/training")]
    out = tmp_path / "out"
    assert predict_main([str(run), *images, "--out", str(out)]) == 0
    labels = np.asarray(Image.open(next(out.glob("*scene_3_labels.png"))))
    assert labels.shape == (64, 80)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}


def test_killed_at_any_moment_and_resumed_gives_the_same_losses(make_folder, tmp_path) -> None:
    """kill -9 behind a checkpoint; the second start carries on and no draw, rate, average or weight differs, and the
    metrics of both are one file that reads as if nothing had happened."""
    folder, whole, cut = make_folder(), tmp_path / "whole", tmp_path / "cut"
    options = (
        *("train.max_iters=8", "train.val_interval=4", "train.checkpoint_interval=3", "train.seed=7"),
        *("train.accumulate=2", "head.norm=gn", "train.ema=0.9", "train.clip_grad=1.0", "head.loss=cross_entropy,dice"),
    )
    assert train_main(arguments(folder, whole, *options)) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(ROOT / "tools/train_seg.py"), *arguments(folder, cut, *options)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (cut / "last_checkpoint").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = max(losses(cut), default=0)
    assert before < 8, "the run was over before it could be killed"
    assert not list(cut.glob("*.tmp"))
    assert train_main(arguments(folder, cut, *options, flags=("--resume",))) == 0
    reference, resumed = losses(whole), losses(cut)
    assert set(reference) == set(range(1, 9))
    for iteration in range(4, 9):
        assert resumed[iteration] == pytest.approx(reference[iteration], abs=1e-6), iteration
    for ours, theirs in zip(timeless(cut), timeless(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert [line["step"] for line in timeless(whole) if "mIoU" in line] == [4, 8]
    assert {path.parent.name for path in cut.rglob("events.out.tfevents.*")} == {"tensorboard"}
    ours, theirs = read_weights(cut / "iter_8.pth"), read_weights(whole / "iter_8.pth")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)


@HOOKS.register_module()
class Terminate(Hook):
    """Sends this process what a cluster sends, in the second iteration."""

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stopped(make_folder, tmp_path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder of images, and a run on it that was sent SIGTERM in an iteration with a validation behind it."""
    from mae_transfer.segmentation import recipe

    runtime, folder, run = recipe.runtime, make_folder(), tmp_path / "run"

    def with_terminate(*args, **kwargs):
        config = runtime(*args, **kwargs)
        return {**config, "custom_hooks": [*config["custom_hooks"], {"type": "Terminate"}]}

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "runtime", with_terminate)
        with pytest.raises(SystemExit) as left:
            train_main(arguments(folder, run, *STOPPED))
    assert left.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    return folder, run


STOPPED = ("train.max_iters=4", "train.val_interval=2", "train.warmup_iters=0")


def test_sigterm_saves_and_the_next_start_makes_up_for_the_validation(stopped) -> None:
    folder, run = stopped
    assert (run / "iter_2.pth").is_file()
    assert [line["step"] for line in timeless(run)] == [1, 2]
    assert not list(run.glob("best_*"))
    assert train_main(arguments(folder, run, *STOPPED, flags=("--resume",))) == 0
    lines = timeless(run)
    assert [(line["step"], "mIoU" in line) for line in lines] == [
        *[(1, False), (2, False), (2, True)],
        *[(3, False), (4, False), (4, True)],
    ]
    # Gone on with once more, a finished run does nothing twice.
    assert train_main(arguments(folder, run, *STOPPED, flags=("--resume",))) == 0
    assert timeless(run) == lines


@pytest.mark.slow
def test_what_a_run_may_be_gone_on_with(stopped) -> None:
    folder, run = stopped
    for changed in ("train.seed=5", "train.batch_size=4"):
        with pytest.raises(ConfigError, match="would not see the same samples"):
            train_main(arguments(folder, run, *STOPPED, changed, flags=("--resume",)))
    with pytest.raises(ConfigError, match="has done 2 iterations"):
        train_main(arguments(folder, run, *STOPPED, "train.max_iters=1", flags=("--resume",)))
    with pytest.raises(CheckpointError, match="other parameter groups"):
        train_main(arguments(folder, run, *STOPPED, "train.weight_decay_groups=parity", flags=("--resume",)))
    # A longer run: the rate goes on from where it was and ends at 0 in the new last iteration, not before.
    longer = (*STOPPED, "train.max_iters=6", "train.val_interval=6")
    assert train_main(arguments(folder, run, *longer, flags=("--resume",))) == 0
    rates = [line["base_lr"] for line in timeless(run) if "loss" in line]
    assert rates[5] == pytest.approx(0, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    # The last checkpoint is cut off: the run goes on from the one before.
    last = run / "iter_6.pth"
    last.write_bytes(last.read_bytes()[:1000])
    assert train_main(arguments(folder, run, *longer, flags=("--resume",))) == 0
    assert "falling back" in "".join(path.read_text() for path in run.glob("*/*.log"))
    assert [line["step"] for line in timeless(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_accumulation_changes_neither_schedule_nor_losses(make_folder, tmp_path) -> None:
    """The trap: iterations that count micro-batches end the schedule half-way, and train the second half at rate 0."""
    folder, lines = make_folder(), {}
    for rounds in (1, 2):
        run = tmp_path / f"run_{rounds}"
        options = (
            *("train.max_iters=6", "train.val_interval=6", "train.precision=fp32", f"train.accumulate={rounds}"),
            *("encoder.drop_path=0.0", "head.dropout=0.0", "head.norm=gn", "train.warmup_iters=2", "train.lr=1e-4"),
        )
        config = load_config(CONFIG, read_options(arguments(folder, run, *options)[4:]), work_dir=str(run))
        config.val_dataloader = config.val_cfg = config.val_evaluator = None
        config.default_hooks.checkpoint.save_best = None
        train(config)
        lines[rounds] = timeless(run)
    assert [line["base_lr"] for line in lines[2]] == [line["base_lr"] for line in lines[1]]
    assert all(line["base_lr"] > 0 for line in lines[2][:-1])
    assert [line["loss"] for line in lines[2]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-3)
    assert lines[2][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=1e-6)


@pytest.mark.parametrize(("frozen", "blocks"), [(True, 0), (False, 3)])
def test_what_is_frozen_stays_and_the_rest_learns(tiny_config, frozen: bool, blocks: int) -> None:
    """One step of AdamW. Frozen altogether, the encoder also drops nothing and no gradient is kept for it."""
    config = tiny_config(encoder={"frozen": frozen, "drop_path": 0.5}, train={"precision": "fp32"})
    config.model.backbone.freeze_blocks = blocks
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
    model.train()
    assert model.backbone.blocks[3].training is not frozen
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    maps = model.extract_feat(torch.randn(2, 3, 64, 64))
    wrapper.update_params(model.decode_head(maps).square().mean() + model.auxiliary_head(maps).square().mean())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    still = ("",) if frozen else ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1.", "blocks.2.")
    kept = {name for name in before if name.startswith(tuple(f"backbone.{part}" for part in still))}
    assert kept and not kept & changed
    assert "decode_head.conv_seg.weight" in changed
    assert ("backbone.blocks.3.mlp.fc1.weight" in changed) is not frozen
    assert torch.is_grad_enabled()
    assert model.backbone(torch.randn(2, 3, 64, 64))[0].requires_grad is not frozen


@pytest.mark.slow
def test_compiled_blocks_train_alike(make_folder, tmp_path) -> None:
    folder, runs = make_folder(), []
    for compiled in (True, False):
        run = tmp_path / f"run_{compiled}"
        # Without drop path: compiled code draws its random numbers in its own way.
        options = (
            "train.max_iters=2",
            "train.val_interval=2",
            "train.precision=fp32",
            f"train.compile={compiled}",
            "encoder.drop_path=0.0",
        )
        assert train_main(arguments(folder, run, *options)) == 0
        runs.append(run)
    assert list(losses(runs[0]).values()) == pytest.approx(list(losses(runs[1]).values()), rel=1e-4)
    ours, theirs = (read_weights(run / "iter_2.pth") for run in runs)
    assert ours.keys() == theirs.keys(), "names are those of the plain model"


def test_test_time_augmentation_scales_the_resized_image(make_folder, tmp_path, monkeypatch) -> None:
    from mae_transfer.segmentation.segmentor import MAESegmentor

    folder, run = make_folder(num_val=1), tmp_path / "run"
    assert train_main(arguments(folder, run, "train.max_iters=2", "train.val_interval=2")) == 0
    seen = []
    slide = MAESegmentor.slide_inference
    monkeypatch.setattr(
        MAESegmentor, "slide_inference", lambda self, x, m: (seen.append(tuple(x.shape[2:])), slide(self, x, m))[1]
    )
    command = [str(run / "upernet_tiny.py"), str(run / "iter_2.pth"), "--tta", "--cfg-options", "test.scales=0.5,2.0"]
    assert run_test_tool(command) == 0
    # The image is 64 x 80; resized into (80, 32) it is 32 x 40, and the scales are of that.
    assert sorted(set(seen)) == [(16, 20), (64, 80)]
    assert len(seen) == 4, "two scales, each as it is and flipped"


@pytest.mark.slow
def test_overfitting_a_handful_of_scenes_is_nearly_perfect(make_folder, tmp_path) -> None:
    folder, run = make_folder(num_train=4, size=(96, 96)), tmp_path / "run"
    options = (
        "dataset.val_split=training",
        "dataset.crop_size=96",
        "dataset.resize=(384,96)",
        "dataset.scale_range=1.0,1.0",
        "encoder.drop_path=0.0",
        "head.channels=32",
        "head.dropout=0.0",
        "train.max_iters=150",
        "train.batch_size=4",
        "train.lr=1e-3",
        "train.layer_decay=1.0",
        "train.val_interval=150",
    )
    assert train_main(arguments(folder, run, *options)) == 0
    assert timeless(run)[-1]["mIoU"] > 95


# Mistakes


def test_a_used_folder_is_refused(make_folder, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "something").write_text("")
    with pytest.raises(ConfigError, match="--resume to continue that run"):
        train_main(arguments(make_folder(), run))


def test_a_folder_that_a_run_writes_to_is_refused(make_folder, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run / ".in-use")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline()
    try:
        with pytest.raises(ConfigError, match="is being written to by"):
            train_main(arguments(make_folder(), run, flags=("--resume",)))
    finally:
        holder.communicate(b"\n")


def test_a_run_that_was_refused_before_it_began_may_be_started_again(make_folder, tmp_path) -> None:
    folder, run = make_folder(), tmp_path / "run"
    encoder = build_vit("tiny", patch_size=8, image_size=32, depth=2)
    source = tmp_path / "encoder.safetensors"
    write_safetensors(source, encoder.state_dict(), {**describe(encoder).to_metadata(), "size": "tiny"})
    with pytest.raises(UserError):
        train_main(arguments(folder, run, f"init_checkpoint={source}"))
    assert any(run.iterdir())
    refuse_used_folder(run, resume=False)


def test_a_users_mistake_is_one_line_and_status_2(make_folder, tmp_path, capsys) -> None:
    assert run_tool(train_main, arguments(make_folder(), tmp_path / "run", "train.epochs=3")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: unknown key train.epochs")
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_a_foreign_checkpoint_is_refused(make_folder, tmp_path) -> None:
    folder, path = make_folder(), tmp_path / "foreign.pth"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, path)
    command = [CONFIG, str(path), "--cfg-options", f"dataset.root={folder}", *SMALL]
    with pytest.raises(CheckpointError, match="is not of this model"):
        run_test_tool(command)
    with pytest.raises(CheckpointError, match="does not exist"):
        run_test_tool([CONFIG, str(tmp_path / "none.pth"), *command[2:]])


def test_a_pickle_that_would_run_code_is_refused(tmp_path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "hook": os.system}, path)
    with pytest.raises(CheckpointError, match="refused"):
        read_weights(path)


def test_a_missing_init_checkpoint_is_named(make_folder, tmp_path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        train_main(arguments(make_folder(), tmp_path / "run", "init_checkpoint=nowhere.safetensors"))


def test_a_loss_that_is_not_finite_ends_the_run(make_folder, tmp_path) -> None:
    with pytest.raises(RunFailed, match=r"lower train\.lr"):
        train_main(
            arguments(make_folder(), tmp_path / "run", "train.max_iters=6", "train.lr=1e30", "train.warmup_iters=0")
        )


def test_mismatched_labels_are_found_before_training(make_folder, tmp_path) -> None:
    folder = make_folder()
    (folder / "classes.txt").write_text("ground\nred\n")
    with pytest.raises(UserError, match=r"label of no class: 2 \(256 pixels\), 3 .* the 2 classes are labelled 0 to 1"):
        train_main(arguments(folder, tmp_path / "run"))
