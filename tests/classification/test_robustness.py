"""A trained classifier on folders that hold a part of its classes, under other names, or several sets of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_transfer.classification.evaluate import predict
from mae_transfer.classification.labels import class_numbers, read_class_map
from mae_transfer.classification.model import LoadedClassifier
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.classification.robustness import evaluate_folders, known_classes, result_table
from mae_transfer.classification.setting import Setting
from mae_transfer.data.find import open_source
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.precision import Precision
from mae_transfer.errors import ConfigError, DataError
from tests.classification.small import small_classifier, small_config, small_info, write_classes

ALONE = Processes(device=torch.device("cpu"))
NAMES = [f"class-{number}" for number in range(4)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes 1 and 2."""
    return write_classes(tmp_path_factory.mktemp("part"), classes=2, first=1, seed=3)


def loaded(names: list[str] | None = NAMES) -> LoadedClassifier:
    model = small_classifier()
    return LoadedClassifier(model=model, info=small_info(model), classes=names, metadata={}, path=Path("model.pth"))


def test_a_part_of_the_classes_is_judged_among_all_and_among_those(whole: Path, part: Path) -> None:
    config = small_config(val=[str(whole), str(part)], data={"mean": None, "std": None})
    results = evaluate_folders(config, loaded(), ALONE)
    assert [result.classes for result in results] == [4, 2]
    assert results[0].among is None and results[1].among is not None
    info = loaded().info
    setting = Setting(
        model=small_classifier(),
        data=config.data,
        mean=config.data.mean or info.mean,
        std=config.data.std or info.std,
        precision=Precision("fp32", ALONE.device),
        processes=ALONE,
    )
    source = open_source([part])
    assert source.labels is not None
    found, among = predict(setting, source, source.labels + 1, among=[1, 2])
    assert np.array_equal(results[1].predictions.predicted, found.predicted)
    assert np.array_equal(results[1].among.predicted, among.predicted)
    assert set(among.predicted.tolist()) <= {1, 2}
    assert among.top(1) >= found.top(1) and among.top(2) == 100
    lines = result_table(results, 4)
    assert len(lines) == 5 and lines[-1].startswith("* among the classes that the folder has, of the model's 4")
    mean = np.mean([result.predictions.top(1) for result in results])
    assert f"{mean:7.2f}" in lines[3] and "mean of 2 folders" in lines[3]


def test_the_checkpoints_normalisation_is_used_unless_another_is_given(part: Path) -> None:
    plain = small_config(val=str(part))
    given = small_config(val=str(part), data={"mean": [0.1, 0.9, 0.5], "std": [0.5, 0.1, 0.9]})
    assert plain.data.mean is not None  # a resolved config says ImageNet's
    own = small_config(val=str(part)).data
    object.__setattr__(plain, "data", type(own)(val=str(part), image_size=32, workers=0))
    losses = [evaluate_folders(config, loaded(), ALONE)[0].predictions.mean_loss for config in (plain, given)]
    assert losses[0] != losses[1]
    info = loaded().info
    same = small_config(val=str(part), data={"mean": list(info.mean), "std": list(info.std)})
    assert evaluate_folders(same, loaded(), ALONE)[0].predictions.mean_loss == losses[0]


def test_folders_may_be_called_otherwise(part: Path, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    for old, new in (("class-1", "heron"), ("class-2", "crane")):
        (folder / new).mkdir(parents=True)
        for path in (part / old).iterdir():
            Image.open(path).save(folder / new / path.name)
    source = open_source([folder])
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"heron": "class-1", "crane": "class-2"}))
    labels = class_numbers(source, NAMES, num_classes=4, renamed=read_class_map(str(mapping)), key="data.val")
    assert labels.tolist() == [2] * 6 + [1] * 6  # crane, heron
    numbered = class_numbers(source, None, num_classes=4, renamed={"heron": 3, "crane": 3}, key="data.val")
    assert numbered.tolist() == [3] * 12
    with pytest.raises(ConfigError, match=r"does not know: crane, heron\. Say which they are in data\.class_map"):
        class_numbers(source, NAMES, num_classes=4, renamed={}, key="data.val")
    with pytest.raises(ConfigError, match=r"heron \(class-7\); is heron \(class-7\) class-\d\?"):
        class_numbers(source, NAMES, num_classes=4, renamed={"heron": "class-7", "crane": 0}, key="data.val")
    with pytest.raises(ConfigError, match="does not know: heron"):
        class_numbers(source, NAMES, num_classes=4, renamed={"heron": 4, "crane": 0}, key="data.val")


def test_a_folder_of_one_class_is_judged_and_not_trained_on(whole: Path, tmp_path: Path) -> None:
    write_classes(tmp_path, classes=1, first=2)
    (result,) = evaluate_folders(small_config(val=str(tmp_path)), loaded(), ALONE)
    assert result.classes == 1 and set(result.predictions.labels.tolist()) == {2}
    assert result.among is not None and result.among.top(1) == 100
    (tmp_path / "class-2").rename(tmp_path / "heron")
    source = open_source([tmp_path])
    renamed = class_numbers(source, NAMES, num_classes=4, renamed={"heron": "class-3"}, key="data.val")
    assert renamed.tolist() == [3] * 6
    with pytest.raises(ConfigError, match=r"only one class folder \(heron\) to train on.*two or more classes"):
        ClassificationRun(small_config(tmp_path, str(whole)), ALONE)


def test_a_folder_that_does_not_exist_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.val: image folder .*absent does not exist"):
        evaluate_folders(small_config(val=str(tmp_path / "absent")), loaded(), ALONE)
    with pytest.raises(DataError, match=r"data\.train: image folder .*absent does not exist"):
        known_classes(loaded(None), small_config(tmp_path / "absent", str(tmp_path)).data)


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": null}', "{", None])
def test_a_class_map_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="class_map"):
        read_class_map(str(path))


def test_classes_without_names_are_numbered_by_order_or_by_the_training_folder(whole: Path, part: Path) -> None:
    source = open_source([whole])
    labels = class_numbers(source, None, num_classes=4, renamed={}, key="data.val")
    assert source.labels is not None and np.array_equal(labels, source.labels)
    with pytest.raises(ConfigError, match=r"data\.val=x has 2 classes, and the checkpoint does not name its 4"):
        class_numbers(open_source([part]), None, num_classes=4, renamed={}, key="data.val=x")
    assert known_classes(loaded(None), small_config(train=whole, val=str(part)).data) == NAMES
    assert known_classes(loaded(None), small_config(val=str(part)).data) is None
    with pytest.raises(
        ConfigError, match=r"knows 4 classes and does not say which; data\.train, which should say, has 2"
    ):
        known_classes(loaded(None), small_config(train=part, val=str(part)).data)


def test_images_without_labels_are_refused(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val=x has no labels"):
        class_numbers(open_source([whole / "class-0"]), NAMES, num_classes=4, renamed={}, key="data.val=x")
