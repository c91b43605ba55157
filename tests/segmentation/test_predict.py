"""Prediction with a run that is there, against MMSegmentation's own inference; odd images; what cannot be predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS
from PIL import Image

from mae_transfer.errors import CheckpointError, ConfigError, DataError, run_tool
from mae_transfer.predict import main
from mae_transfer.segmentation import Predictor
from mae_transfer.segmentation.config import load_config
from tests.segmentation.conftest import CLASSES, write_folder

# Two blocks instead of twelve.
CONFIG = f"""
_base_ = {str(Path(__file__).resolve().parents[2] / "configs" / "segmentation" / "upernet_tiny.py")!r}
model = {{"backbone": {{"depth": 2, "taps": [0, 0, 1, 1]}}}}
"""
OPTIONS = {
    "dataset.reduce_zero_label": True,
    "dataset.crop_size": 32,
    "dataset.resize": (96, 48),
    "head.channels": 16,
    "head.aux_channels": 16,
    "train.precision": "fp32",
    "test.scales": (0.5, 1.5),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it, with weights that all matter; its data are gone."""
    root = tmp_path_factory.mktemp("predict")
    data, folder = write_folder(root / "ade", zero=True), root / "run"
    folder.mkdir()
    (root / "small.py").write_text(CONFIG)
    config = load_config(root / "small.py", {"dataset.root": str(data), **OPTIONS}, work_dir=str(folder))
    config.dump(folder / "small.py")
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        # No class wins everywhere: logits have a mean of 0 over an image of noise.
        logits = model.eval().encode_decode(torch.randn(1, 3, 64, 64), [])
        model.decode_head.conv_seg.bias.sub_(logits.mean(dim=(0, 2, 3)))
    torch.save({"state_dict": model.state_dict()}, folder / "iter_10.pth")
    data.rename(root / "scenes")
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run, device="cpu")


def scenes(run: Path) -> list[Path]:
    return sorted((run.parent / "scenes" / "images" / "training").iterdir())


def by_mmseg(predictor: Predictor, run: Path, *, tta: bool) -> list[Any]:
    """What MMSegmentation's own data set, pipeline, test_step and SegTTAModel predict on the training scenes."""
    config = load_config(run / "small.py", {"dataset.root": str(run.parent / "scenes")}, work_dir="run")
    source = {**config.test_dataloader.dataset, "split": "training"}
    with DefaultScope.overwrite_default_scope("mmseg"):
        if tta:
            model = MODELS.build({**config.tta_model, "module": predictor.model})
            data = DATASETS.build({**source, "pipeline": config.tta_pipeline})
            batches = ({key: [[item] for item in value] for key, value in entry.items()} for entry in data)
        else:
            model = predictor.model
            data = DATASETS.build(source)
            batches = ({key: [value] for key, value in entry.items()} for entry in data)
        with torch.no_grad():
            return [model.test_step(batch)[0] for batch in batches]


@pytest.mark.filterwarnings("ignore:The shape of value will convert")  # of MMSegmentation's SegTTAModel
@pytest.mark.parametrize("tta", [False, True])
def test_labels_are_mmsegmentations(predictor: Predictor, run: Path, tta: bool) -> None:
    mine = Predictor(run, device="cpu", tta=tta)
    expected = [sample.pred_sem_seg.data.squeeze().numpy() for sample in by_mmseg(mine, run, tta=tta)]
    got = mine.batch(scenes(run))
    assert len(got) == len(expected) == 4
    assert len({int(label) for labels in got for label in np.unique(labels)}) > 1
    for labels, reference in zip(got, expected, strict=True):
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, reference)


def test_probabilities_are_of_the_logits_that_mmsegmentation_keeps(predictor: Predictor, run: Path) -> None:
    expected = [sample.seg_logits.data.softmax(dim=0).numpy() for sample in by_mmseg(predictor, run, tta=False)]
    for probabilities, reference in zip(predictor.probabilities(scenes(run)), expected, strict=True):
        np.testing.assert_allclose(probabilities, reference, atol=1e-5)
        np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("tta", [False, True])
def test_a_batch_of_any_sizes_is_what_single_images_give(run: Path, tta: bool) -> None:
    predictor = Predictor(run, device="cpu", tta=tta)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in ((64, 80), (20, 70), (33, 9), (64, 80))]
    found = predictor.batch(images)
    assert [labels.shape for labels in found] == [image.shape[:2] for image in images]
    for image, labels, probabilities in zip(images, found, predictor.probabilities(images), strict=True):
        np.testing.assert_array_equal(labels, probabilities.argmax(axis=0))
        # Sums of another order may turn a tie.
        assert (predictor(image) != labels).mean() < 0.005


def test_scales_are_averaged_where_the_settings_say_so(run: Path) -> None:
    assert Predictor(run, device="cpu").scales is None
    assert Predictor(run, device="cpu", options={"test.tta": True}).scales == (0.5, 1.5)
    assert Predictor(run, device="cpu", options={"test.tta": True}, tta=False).scales is None


def test_many_classes_are_compared_in_parts(predictor: Predictor) -> None:
    logits = torch.randint(0, 9, (50, 5, 7), generator=torch.Generator().manual_seed(0)).float()  # with ties
    expected = torch.nn.functional.interpolate(logits[None], size=(10, 14), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(predictor._labels(logits, (10, 14)).long(), expected)


def test_files_arrays_and_names_of_a_run_agree(predictor: Predictor, run: Path) -> None:
    file = scenes(run)[0]
    labels = predictor(np.array(Image.open(file)))
    np.testing.assert_array_equal(labels, predictor(str(file)))
    np.testing.assert_array_equal(labels, Predictor(run / "iter_10.pth", device="cpu")(file))
    assert predictor.classes == CLASSES
    assert predictor.first_label == 1


def test_the_best_checkpoint_is_taken(run: Path, tmp_path: Path) -> None:
    from mae_transfer.segmentation.predict import find_checkpoint

    for name in ("iter_900.pth", "iter_1000.pth"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path).name == "iter_1000.pth"
    for name in ("best_mIoU_iter_900.pth", "best_mIoU_iter_1000.pth"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path).name == "best_mIoU_iter_1000.pth"


def test_a_turned_photograph_is_predicted_as_it_is_seen(predictor: Predictor, run: Path, tmp_path: Path) -> None:
    upright = Image.open(scenes(run)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # seen turned by 90° clockwise
    turned = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    np.testing.assert_array_equal(predictor(turned), predictor(np.array(upright)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_odd_images_are_predicted(predictor: Predictor, run: Path, tmp_path: Path, mode: str) -> None:
    image = Image.open(scenes(run)[0]).convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    path = tmp_path / ("odd.jpg" if mode == "CMYK" else "odd.png")
    image.save(path)
    assert predictor(path).shape == (64, 80)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_arrays_of_another_kind_are_refused(image: np.ndarray, predictor: Predictor) -> None:
    with pytest.raises(DataError, match=r"expected uint8 \(height, width, 3\)"):
        predictor(image)


def test_what_cannot_be_meant(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device=tpu9"):
        Predictor(run, device="tpu9")
    with pytest.raises(CheckpointError, match="does not exist"):
        Predictor(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds 0 config files"):
        Predictor(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown key dataset\.clases"):
        Predictor(run, options={"dataset.clases": "x"})


def tool(run: Path, *arguments: str | Path) -> int:
    return run_tool(main, [str(run), *map(str, arguments), "--device", "cpu"])


def test_the_tool_writes_overlays_labels_and_what_they_mean(predictor: Predictor, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tool(run, scenes(run)[0].parent, "--out", out, "--batch-size", "3") == 0
    names = [path.stem for path in scenes(run)]
    expected = {"legend.png", "classes.json", *(f"{name}{end}.png" for name in names for end in ("", "_labels"))}
    assert {path.name for path in out.iterdir()} == expected
    meanings = json.loads((out / "classes.json").read_text())
    assert [(entry["label"], entry["name"]) for entry in meanings] == list(enumerate(CLASSES, start=1))
    for path, labels in zip(scenes(run), predictor.batch(scenes(run)), strict=True):
        with Image.open(out / f"{path.stem}_labels.png") as picture:
            assert picture.mode == "P"
            written, shown = np.array(picture), np.array(picture.convert("RGB"))
        np.testing.assert_array_equal(written, labels + 1)  # the masks' own labels: 0 is unlabelled
        colours = np.array([entry["colour"] for entry in meanings])
        np.testing.assert_array_equal(shown, colours[labels])
    with Image.open(out / "legend.png") as legend:
        seen = set(map(tuple, np.array(legend).reshape(-1, 3).tolist()))
    assert {tuple(entry["colour"]) for entry in meanings} <= seen


def test_files_of_one_name_do_not_overwrite_each_other(run: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 16)).save(tmp_path / folder / "same.png")
    out = tmp_path / "out"
    assert tool(run, tmp_path / "a", tmp_path / "b", "--out", out) == 0
    assert {path.name for path in out.glob("0*.png")} == {
        f"{number}_same{end}.png" for number in ("0000", "0001") for end in ("", "_labels")
    }


def test_an_unreadable_image_does_not_cost_the_others(run: Path, tmp_path: Path, capsys: Any) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "c.png"):
        Image.new("RGB", (20, 16)).save(images / name)
    (images / "b.png").write_bytes(b"not an image")
    assert tool(run, images, "--out", tmp_path / "out", "--batch-size", "2") == 2
    error = capsys.readouterr().err
    assert "1 of 3 images could not be read" in error and "b.png" in error and "Traceback" not in error
    assert (tmp_path / "out" / "c_labels.png").is_file()


def test_a_checkpoint_without_its_run_is_predicted_by_a_config(predictor: Predictor, run: Path, tmp_path: Path) -> None:
    release = tmp_path / "release.pth"
    release.write_bytes((run / "iter_10.pth").read_bytes())
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    options = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in OPTIONS.items()]
    file, out = scenes(run)[0], tmp_path / "out"
    given: list[str | Path] = [
        "--config",
        run.parent / "small.py",
        "--cfg-options",
        f"dataset.root={tmp_path}",
        f"dataset.classes={names}",
        *options,
    ]
    assert tool(release, file, "--out", out, *given) == 0
    with Image.open(out / f"{file.stem}_labels.png") as picture:
        np.testing.assert_array_equal(np.array(picture), predictor(file) + 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0"),
        (["--device", "abacus"], "device=abacus"),
        (["--json", "x.json"], "--json is for detection runs"),
        (["--cfg-options", "dataset.classes"], "expected key=value"),
        (["--config", "x.py"], "--config is for a checkpoint without its run"),
    ],
)
def test_settings_that_are_none(more: list[str], message: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_tool(main, [str(run), str(scenes(run)[0]), "--out", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
