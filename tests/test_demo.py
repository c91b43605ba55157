"""The demo: the commands are those of the tools, stages are run once, continued after an interruption, and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_transfer.charts import Series
from mae_transfer.demo import main, run_demo, run_stage
from mae_transfer.demo_page import averaged, curve, detection_panel, difference, segmentation_panel
from mae_transfer.demo_plan import FULL, ROOT, SIZES, SMOKE, Layout, Stage, last_value, shown, stages
from mae_transfer.errors import ConfigError, RunFailed, run_tool


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(out=tmp_path / "demo")


def counting_stage(layout: Layout, **changes: object) -> Stage:
    """A stage that appends a line to a file, so that the number of its runs can be counted."""
    code = f"open({str(layout.out / 'runs.txt')!r}, 'a').write('run\\n'); open({str(layout.out / 'product')!r}, 'w')"
    stage = Stage(name="count", title="counting", command=("-c", code), product=layout.out / "product", seconds=1)
    return replace(stage, **changes)


def num_runs(layout: Layout) -> int:
    return len((layout.out / "runs.txt").read_text().splitlines())


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_command_is_a_tool_with_files_that_exist(layout: Layout, size) -> None:
    for stage in stages(layout, size):
        assert (ROOT / stage.command[0]).is_file(), stage.command[0]
        for word in stage.command:
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), word


def test_both_starts_get_the_same_budget(layout: Layout) -> None:
    """The commands differ in where the encoder comes from and where the run is written, and in nothing else."""
    commands = {stage.name: stage.command for stage in stages(layout, FULL)}
    for task in ("detection", "segmentation", "classification"):
        pretrained, random = (commands[f"{task}-{start}"] for start in ("pretrained", "random"))
        differing = [pair for pair in zip(pretrained, random, strict=True) if pair[0] != pair[1]]
        keys = {word.split("=")[0] for pair in differing for word in pair}
        encoder = {"detection": {"train.init_checkpoint", "model.patch_size"}}
        encoder["segmentation"] = {"init_checkpoint", "encoder.patch_size"}
        encoder["classification"] = {"init_checkpoint", "model.patch_size"}
        folder = {
            "detection": {"train.output_dir"},
            "segmentation": {str(layout.segmentation(s)) for s in ("pretrained", "random")},
            "classification": {"run.dir"},
        }
        assert keys == encoder[task] | folder[task]


def test_a_finished_stage_is_not_run_again(layout: Layout) -> None:
    stage = counting_stage(layout)
    first = run_stage(stage, layout, lambda part: None)
    assert first.finished
    assert run_stage(stage, layout, lambda part: None) == first
    assert num_runs(layout) == 1


def test_a_stage_whose_product_is_gone_is_run_again(layout: Layout) -> None:
    stage = counting_stage(layout)
    run_stage(stage, layout, lambda part: None)
    stage.product.unlink()
    run_stage(stage, layout, lambda part: None)
    assert num_runs(layout) == 2


def test_an_interrupted_stage_gets_its_resume_flag_and_keeps_its_time(layout: Layout) -> None:
    begun = layout.out / "begun"
    code = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True); "
        "(folder / 'x').touch(); sys.exit(0 if '--resume' in sys.argv else 3)"
    )
    stage = counting_stage(
        layout, command=("-c", code, str(begun)), product=begun / "x", started=begun, resume=("--resume",)
    )
    with pytest.raises(RunFailed, match="exit status 3"):
        run_stage(stage, layout, lambda part: None)
    before = json.loads(layout.record("count").read_text())
    assert not before["finished"]  # although its product exists
    record = run_stage(stage, layout, lambda part: None)
    assert record.finished
    assert record.seconds > before["seconds"]


def test_a_failed_stage_shows_the_end_of_its_log(layout: Layout) -> None:
    stage = counting_stage(layout, command=("-c", "import sys; print('what went wrong'); sys.exit(1)"))
    with pytest.raises(RunFailed, match="what went wrong"):
        run_stage(stage, layout, lambda part: None)


def test_a_stage_that_leaves_nothing_has_failed(layout: Layout) -> None:
    with pytest.raises(RunFailed, match="left no"):
        run_stage(counting_stage(layout, command=("-c", "pass")), layout, lambda part: None)


def test_progress_is_what_the_tools_wrote(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    first.write_text('{"iter": 10}\n{"iter": 20}\n')
    second.write_text('{"iter": 30}\n{"mIoU": 5}\n{"iter": 4')  # being written
    assert last_value([first], "iter") == 20
    assert last_value([second, first], "iter") == 30
    assert last_value([], "iter") == 0


def test_another_size_in_the_same_folder_is_refused(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage, layout, on_progress):
        pytest.fail("nothing may be run")

    first = stages(layout, SMOKE)[0]
    layout.record(first.name).parent.mkdir(parents=True)
    layout.record(first.name).write_text(json.dumps({"command": first.command, "seconds": 1, "finished": True}))
    monkeypatch.setattr("mae_transfer.demo.run_stage", fail)
    with pytest.raises(ConfigError, match="other settings"):
        run_demo(layout.out, "full")


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert run_tool(main, ["--out", str(tmp_path), "--size", "smoke"]) == 2
    assert "not a demo's folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_shown_command_can_be_typed() -> None:
    assert shown(("tools/x.py", "a=[1,2]", "b")) == "python tools/x.py 'a=[1,2]' b"


@pytest.mark.parametrize(
    ("pretrained", "random", "words"),
    [(30.04, 28.0, "2.0 points higher"), (1.0, 4.5, "3.5 points lower"), (7.01, 6.99, "No difference")],
)
def test_the_difference_is_said_whichever_way_it_falls(pretrained: float, random: float, words: str) -> None:
    assert words in difference("box AP", pretrained, random)


def test_a_curve_takes_the_later_of_two_lines_of_a_step() -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "loss": 2.0}, {"other": 1}]
    assert Series(name="a", points=curve(lines, "step", "loss")).points == [(1, 3.0), (2, 2.0)]


def test_a_noisy_curve_is_averaged_over_parts_of_it() -> None:
    assert averaged([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(1, 2.0), (2, 5.0)]


@pytest.mark.slow
def test_the_smallest_demo_from_end_to_end_and_again(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    report = run_demo(out, "smoke")
    text = report.read_text(encoding="utf-8")
    for word in ("Mask R-CNN", "UperNet", "box AP", "mIoU", "python tools/pretrain.py", "One seed"):
        assert word in text
    assert text.count("data:image/jpeg") > 15
    records = {path.name: path.read_text() for path in (out / "stages").iterdir()}
    run_demo(out, "smoke")  # only the page is made again
    assert {path.name: path.read_text() for path in (out / "stages").iterdir()} == records


@pytest.mark.parametrize("side", [64, 128, 512])
def test_a_panel_of_a_tools_picture_is_the_whole_scene(side: int, tmp_path: Path) -> None:
    """Whatever the tools enlarge small scenes by: cut out and brought back, it is what they have drawn."""
    pytest.importorskip("detectron2")
    from mae_transfer.detection.visualize import readable_scale, save_image, side_by_side
    from mae_transfer.segmentation.visualize import draw_segmentation, overlay, save_picture

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    truth, prediction = rng.integers(0, 2, (2, side, side), dtype=np.uint8)
    palette = [(255, 0, 0), (0, 0, 255)]
    save_picture(draw_segmentation(image, prediction, ["a", "b"], palette, truth), tmp_path / "segmentation.png")
    for index, drawn in enumerate((image, overlay(image, truth, palette), overlay(image, prediction, palette))):
        panel = segmentation_panel(tmp_path / "segmentation.png", index)
        np.testing.assert_array_equal(np.asarray(panel.resize((side, side), Image.Resampling.NEAREST)), drawn)
    scale = readable_scale(image)
    large = np.asarray(Image.fromarray(image).resize((scale * side, scale * side), Image.Resampling.NEAREST))
    save_image(side_by_side(large, 255 - large), tmp_path / "detection.png")
    for index, drawn in enumerate((image, 255 - image)):
        panel = detection_panel(tmp_path / "detection.png", index)
        np.testing.assert_array_equal(np.asarray(panel.resize((side, side), Image.Resampling.NEAREST)), drawn)
