"""The draws of a training: what is read and augmented does not depend on restarts, processes or what came before."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS

from mae_transfer.errors import ConfigError
from mae_transfer.segmentation.config import load_config
from mae_transfer.segmentation.dataset import LabelledImages, ReplaySampler


def augmented(root: Path) -> LabelledImages:
    pipeline = [
        {"type": "LoadPicture"},
        {"type": "LoadLabels"},
        {"type": "RandomResize", "scale": (160, 64), "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (32, 32), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
    ]
    with DefaultScope.overwrite_default_scope("mmseg"):
        return LabelledImages(
            root=str(root), split="training", classes=("a", "b", "c", "d"), reduce_zero_label=False, pipeline=pipeline
        )


def test_a_draw_repeats_whatever_happened_before(make_folder) -> None:
    dataset = augmented(make_folder())
    draws = list(islice(ReplaySampler(dataset, seed=5), 12))
    images = [dataset[draw]["img"] for draw in draws]
    np.random.default_rng().random(7)
    skipped = ReplaySampler(dataset, seed=5)
    skipped.skip(8)
    for draw, image in zip(islice(skipped, 4), images[8:], strict=True):
        np.testing.assert_array_equal(dataset[pickle.loads(pickle.dumps(draw))]["img"], image)  # noqa: S301


def test_draws_do_not_depend_on_the_number_of_processes(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = augmented(make_folder())
    alone = [(int(draw), draw.seed) for draw in islice(ReplaySampler(dataset, seed=5), 12)]
    shared = []
    for rank in range(3):
        monkeypatch.setattr("mae_transfer.segmentation.dataset.get_dist_info", lambda rank=rank: (rank, 3))
        shared.append([(int(draw), draw.seed) for draw in islice(ReplaySampler(dataset, seed=5), 4)])
    assert [shared[position % 3][position // 3] for position in range(12)] == alone


def test_every_epoch_holds_every_image_once_in_another_order(make_folder) -> None:
    dataset = augmented(make_folder(num_train=8))
    drawn = list(islice(ReplaySampler(dataset, seed=1), 24))
    epochs = [drawn[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({draw.seed for draw in drawn}) == 24


def test_augmentation_leaves_the_global_random_numbers_alone(make_folder) -> None:
    dataset = augmented(make_folder())
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    dataset[next(iter(ReplaySampler(dataset, seed=1)))]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_share_of_the_training_images(make_folder, tmp_path) -> None:
    config = tmp_path / "config.py"
    config.write_text("dataset = {}\nencoder = {'size': 'tiny'}\n", encoding="utf-8")

    def images(fraction: float, seed: int, which: str = "train") -> set[str]:
        options = {"dataset.root": str(root), "dataset.fraction": fraction, "dataset.fraction_seed": seed}
        derived = load_config(config, options, work_dir=str(tmp_path / "run"))
        with DefaultScope.overwrite_default_scope("mmseg"):
            dataset = DATASETS.build(derived[f"{which}_dataloader"].dataset)
        return {entry["img_path"] for entry in dataset.load_data_list()}

    root = make_folder(num_train=8)
    assert len(images(1.0, 0)) == 8
    assert len(images(0.25, 0)) == 2
    assert images(0.25, 0) < images(0.5, 0)
    assert len({frozenset(images(0.25, seed)) for seed in range(4)}) > 1
    assert images(0.25, 0, "val") == images(1.0, 0, "val")
    with pytest.raises(ConfigError, match=r"dataset\.fraction=0"):
        images(0, 0)
