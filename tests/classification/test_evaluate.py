"""Accuracy on a folder against torchvision's data set and pipeline, images counted once; neighbours; features."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mae_transfer.classification.evaluate import Evaluation, predict
from mae_transfer.classification.features import CachedFeatures, Encoded, encode
from mae_transfer.classification.knn import run_knn
from mae_transfer.classification.model import Classifier
from mae_transfer.classification.sections import KnnConfig
from mae_transfer.classification.setting import Setting
from mae_transfer.data.find import open_source
from mae_transfer.data.sampler import SampleKey
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.ema import WeightAverage
from mae_transfer.engine.precision import Precision
from mae_transfer.errors import RunFailed
from tests.classification.small import SIZE, small_classifier, small_config, write_classes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CPU = torch.device("cpu")


class OneByOne(Processes):
    """Processes that take their turns: the last one's sums are those of all."""

    sums: dict[int, Tensor]

    def sum(self, values: Tensor) -> Tensor:
        number = self.sums.setdefault(-self.rank - 1, torch.zeros((), dtype=torch.int64)).add_(1).item()
        self.sums[int(number)] = self.sums.get(int(number), torch.zeros_like(values)) + values
        return self.sums[int(number)]


def processes_of(world_size: int) -> list[Processes]:
    group = [OneByOne(device=CPU, rank=rank, world_size=world_size) for rank in range(world_size)]
    shared: dict[int, Tensor] = {}
    for one in group:
        object.__setattr__(one, "sums", shared)
    return list(group)


def a_run(train: Path, val: Path, processes: Processes, **sections: object) -> Any:
    """What evaluation needs of a run."""
    config = small_config(train, val, **sections)
    source, val_source = open_source([train]), open_source([val])
    return SimpleNamespace(
        config=config,
        model=small_classifier(),
        mean=MEAN,
        std=STD,
        precision=Precision("fp32", CPU),
        processes=processes,
        source=source,
        labels=source.labels,
        val_source=val_source,
        val_labels=val_source.labels,
        average=None,
        num_steps=30,
        every=lambda epochs: int(10 * epochs),
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("val"), images=5, seed=1)


@torch.no_grad()
def theirs(folder: Path, model: Classifier, *, features: bool = False) -> tuple[Tensor, Tensor]:
    """Logits or features and labels, image by image through torchvision's data set and the released pipeline."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(int(SIZE / (224 / 256)), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    data = ImageFolder(str(folder), pipeline)
    call = model.encode if features else model
    return torch.cat([call(image[None]) for image, _ in data]), torch.tensor(data.targets)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_accuracy_equals_an_independent_pipelines_for_any_number_of_processes(
    train: Path, val: Path, world_size: int
) -> None:
    for processes in processes_of(world_size):
        run = a_run(train, val, processes)
        among = [0, 1, 3]
        found, restricted = predict(Setting.of(run), run.val_source, run.val_labels, among=among)
    logits, labels = theirs(val, run.model)
    assert np.array_equal(found.predicted, logits.argmax(1).numpy()) and len(found.predicted) == 20
    for k in (1, 2, 3):
        assert found.top(k) == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=k))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert found.mean_loss == pytest.approx(loss.item(), rel=1e-4)
    logits[:, 2] = -torch.inf
    own = labels != 2  # of the others nothing is claimed
    assert np.array_equal(restricted.predicted, logits.argmax(1).numpy())
    expected = top_k_accuracy_score(labels[own], logits[own][:, among], k=2, labels=among)
    assert 100 * (restricted.rank[own.numpy()] < 2).mean() == pytest.approx(100 * expected)


def test_the_hook_gives_numbers_and_leaves_the_model_training(train: Path, val: Path) -> None:
    run = a_run(train, val, Processes(device=CPU))
    run.model.train()
    hook = Evaluation(run).hook
    numbers = hook.run(10)
    assert run.model.training and hook.every_steps == 10
    found, *_ = predict(Setting.of(run), run.val_source, run.val_labels)
    assert numbers == {"val_top1": found.top(1), "val_top5": found.top(5), "val_loss": found.mean_loss}
    assert not any(parameter.grad is not None for parameter in run.model.parameters())


def test_the_average_of_the_weights_is_judged_beside_the_weights(train: Path, val: Path) -> None:
    run = a_run(train, val, Processes(device=CPU))
    run.average = WeightAverage(run.model, 0.9)
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for tensor in run.average.tensors.values():
        tensor.zero_()
    evaluation = Evaluation(run)
    numbers = evaluation.hook.run(10)
    assert numbers["val_loss_ema"] == pytest.approx(np.log(4), rel=1e-6)  # nothing but zeros
    (found,) = predict(Setting.of(run), run.val_source, run.val_labels)
    assert numbers["val_loss"] == found.mean_loss and evaluation.latest is not None
    assert np.array_equal(evaluation.latest.predicted, found.predicted)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())


def test_a_linear_probe_encodes_the_images_once(train: Path, val: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = a_run(train, val, Processes(device=CPU), protocol="linear")
    hook = Evaluation(run).hook
    expected, *_ = predict(Setting.of(run), run.val_source, run.val_labels)
    for step in (10, 20):
        numbers = hook.run(step)
        assert numbers["val_top1"] == expected.top(1)
        assert numbers["val_loss"] == pytest.approx(expected.mean_loss, rel=1e-5)
    assert caplog.text.count("encoded the 20 images of data.val") == 1
    torch.nn.init.zeros_(run.model.head.weight)  # the head as it is now, on features as they were
    torch.nn.init.zeros_(run.model.head.bias)
    assert hook.run(30)["val_loss"] == pytest.approx(np.log(4), rel=1e-6)


def test_unreadable_images_are_named_left_out_and_counted(
    train: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val = write_classes(tmp_path, images=5, seed=1)
    (val / "class-2" / "3.png").write_bytes(b"no picture")
    run = a_run(train, val, Processes(device=CPU), data={"max_unreadable": 0.1})
    found, *_ = predict(Setting.of(run), run.val_source, run.val_labels)
    assert found.predicted[13] == -1 and found.readable.sum() == 19
    assert "class-2/3.png" in caplog.text and "it is left out of data.val" in caplog.text
    strict = a_run(train, val, Processes(device=CPU), data={"max_unreadable": 0.01})
    with pytest.raises(RunFailed, match=r"1 of 20 images cannot be read, more than data\.max_unreadable=0\.01"):
        predict(Setting.of(strict), strict.val_source, strict.val_labels)


@pytest.mark.parametrize(("limit", "refused"), [(0.15, True), (0.2, False)])
@pytest.mark.parametrize("encoding", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_limit_of_unreadable_images_is_that_of_all_processes_together(
    train: Path, tmp_path: Path, world_size: int, encoding: bool, limit: float, refused: bool
) -> None:
    val = write_classes(tmp_path, images=5, seed=1)
    for number in range(4):
        (val / f"class-{number}" / "3.png").write_bytes(b"no picture")
    for processes in processes_of(world_size):
        run = a_run(train, val, processes, data={"max_unreadable": limit})
        # None of three has seen more than the limit itself; here, where they take their turns, the last learns of all.
        last = processes.rank == world_size - 1
        with pytest.raises(RunFailed, match="4 of 20 images") if refused and last else nullcontext():
            if encoding:
                encode(Setting.of(run), run.val_source, "data.val")
            else:
                predict(Setting.of(run), run.val_source, run.val_labels)


@pytest.mark.parametrize("world_size", [1, 2])
def test_features_of_all_images(train: Path, val: Path, world_size: int) -> None:
    for processes in processes_of(world_size):
        run = a_run(train, val, processes)
        encoded = encode(Setting.of(run), run.source, "data.train")
    expected, _ = theirs(train, run.model, features=True)
    torch.testing.assert_close(encoded.features, expected, rtol=1e-4, atol=1e-5)
    assert encoded.readable.all() and not encoded.features.requires_grad


def test_cached_features_take_the_place_of_images() -> None:
    readable = torch.tensor([True, False, False, True, True, False])
    encoded = Encoded(features=torch.arange(12.0).view(6, 2), readable=readable)
    cached = CachedFeatures(encoded, np.arange(6))
    batch = cached.__getitems__([SampleKey(0, index) for index in (0, 1, 2, 4, 5)])
    assert batch.labels.tolist() == [0, 3, 3, 4, 0] and len(cached) == 6
    assert batch.images[:, 0].tolist() == [0, 6, 6, 8, 0]


def test_neighbours_vote_as_scikit_learns(train: Path, val: Path) -> None:
    run = a_run(train, val, Processes(device=CPU), protocol="knn", knn=KnnConfig(k=[3, 10], temperature=0.05))
    numbers, best = run_knn(run)
    (own, own_labels), (unseen, labels) = (theirs(folder, run.model, features=True) for folder in (train, val))
    top1 = {}
    for k in (3, 10):
        oracle = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.05)
        ).fit(own, own_labels)
        top1[k] = 100 * oracle.score(unseen, labels)
        assert numbers[f"knn_top1_k{k}"] == pytest.approx(top1[k])
    assert numbers["val_top1"] == max(top1.values()) == best.top(1)
    assert numbers["knn_k"] == max(top1, key=lambda k: top1[k])


def test_an_image_that_is_in_both_sets_is_not_asked_about_itself(train: Path) -> None:
    run = a_run(train, train, Processes(device=CPU), protocol="knn", knn=KnnConfig(k=[1]))
    _, found = run_knn(run)
    features, labels = theirs(train, run.model, features=True)
    unit = torch.nn.functional.normalize(features)
    similar = (unit @ unit.T).fill_diagonal_(-1)
    assert np.array_equal(found.predicted, labels[similar.argmax(1)].numpy())


@pytest.mark.parametrize("spelling", ["relative", "link to a folder", "links to files"])
def test_such_an_image_is_known_however_its_path_is_spelt(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    expected = run_knn(a_run(train, train, Processes(device=CPU), protocol="knn", knn=KnnConfig(k=[1])))[0]
    val = tmp_path / "val"
    if spelling == "relative":
        monkeypatch.chdir(train.parent)
        val = Path(train.name)
    elif spelling == "link to a folder":
        val.symlink_to(train)
    else:
        for path in train.glob("*/*.png"):
            (val / path.parent.name).mkdir(parents=True, exist_ok=True)
            (val / path.parent.name / path.name).symlink_to(path)
    run = a_run(train, val, Processes(device=CPU), protocol="knn", knn=KnnConfig(k=[1]))
    assert run_knn(run)[0] == expected and expected["val_top1"] < 100
