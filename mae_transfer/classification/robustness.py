"""A trained classifier on other images than it was validated on: any folders whose classes are, or are called after,
classes that it knows.

Robustness sets hold a part of the training classes (ImageNet-A and -R: 200 of 1000), and accuracy is published among
those alone: whatever class such an image is of, it cannot be another. Both numbers are given, among all classes and
among the folder's. Several folders (ImageNet-C has one for each corruption and strength) make a table with their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.evaluate import predict
from mae_transfer.classification.labels import class_numbers, read_class_map
from mae_transfer.classification.metrics import Predictions
from mae_transfer.classification.model import LoadedClassifier, load_classifier
from mae_transfer.classification.sections import DataConfig
from mae_transfer.classification.setting import Setting
from mae_transfer.data.find import open_source
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.precision import Precision
from mae_transfer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """A folder of images.

    Attributes:
        classes: how many of the model's classes its images are of.
        among: predictions among these alone; None where they are all of them.
    """

    name: str
    classes: int
    predictions: Predictions
    among: Predictions | None


def evaluate_checkpoint(config: ClassificationConfig, checkpoint: str, processes: Processes) -> str:
    """What ``tools/train_cls.py --evaluate`` prints: the accuracy of a trained classifier on ``data.val``, folder by
    folder.

    Of the config count ``data.*`` and ``train.precision``; the model and, unless ``data.mean`` and ``data.std`` are
    given, the normalisation are the checkpoint's. Processes share the images; each must call this.

    Raises:
        CheckpointError: not a trained classifier. DataError: images not found. ConfigError: no labels, or classes that
        the model does not know.
    """
    loaded = load_classifier(checkpoint, image_size=config.data.size)
    results = evaluate_folders(config, loaded, processes)
    data = config.data
    lines = [
        f"{loaded.path}: {loaded.model.num_classes} classes; images of {data.size[0]}x{data.size[1]} pixels, "
        f"{data.crop_share:.1%} of the resized image's side"
    ]
    if data.size != loaded.info.image_size:
        trained = "x".join(map(str, loaded.info.image_size))
        lines.append(f"the checkpoint is of images of {trained} pixels (data.image_size): positions were resized")
    return "\n".join(lines + result_table(results, loaded.model.num_classes))


def evaluate_folders(
    config: ClassificationConfig, loaded: LoadedClassifier, processes: Processes
) -> list[FolderResult]:
    """Each folder of ``data.val``, in order; all processes call this and get it. Raises as ``evaluate_checkpoint``."""
    data, info, model = config.data, loaded.info, loaded.model.to(processes.device)
    if data.channels != info.channels:
        raise ConfigError(f"data.channels={data.channels}, and {loaded.path} is of images of {info.channels} channels")
    names = known_classes(loaded, data)
    renamed = read_class_map(data.class_map)
    # Everything is looked up before the first image is: the last of many folders may be the wrong one.
    sources = [
        open_source(
            [root], channels=data.channels, floats=data.own_statistics, cache=data.scan_cache_folder, key="data.val"
        )
        for root in data.val_roots
    ]
    labels = [
        class_numbers(source, names, num_classes=model.num_classes, renamed=renamed, key=f"data.val={root}")
        for source, root in zip(sources, data.val_roots, strict=True)
    ]
    setting = Setting(
        model=model,
        data=data,
        mean=data.mean or list(info.mean),
        std=data.std or list(info.std),
        precision=Precision(config.train.precision, processes.device),
        processes=processes,
    )
    results = []
    for root, source, own in zip(data.val_roots, sources, labels, strict=True):
        present = np.unique(own).tolist()
        among = present if len(present) < model.num_classes else None
        found = predict(setting, source, own, what=f"data.val={root}", among=among)
        results.append(
            FolderResult(
                name=str(root),
                classes=len(present),
                predictions=found[0],
                among=found[1] if among is not None else None,
            )
        )
    return results


def known_classes(loaded: LoadedClassifier, data: DataConfig) -> list[str] | None:
    """The names of the model's classes: its own, else those of the folders of ``data.train``, else None.

    Raises:
        ConfigError: ``data.train`` has another number of classes than the model.
    """
    if loaded.classes is not None or data.train is None:
        return loaded.classes
    source = open_source(
        data.train_roots,
        channels=data.channels,
        floats=data.own_statistics,
        cache=data.scan_cache_folder,
        key="data.train",
    )
    classes = source.classes
    if classes is None or len(classes) != loaded.model.num_classes:
        raise ConfigError(
            f"{loaded.path} knows {loaded.model.num_classes} classes and does not say which; data.train, which should "
            f"say, has {'none' if classes is None else len(classes)}. Give the folder that it was trained on"
        )
    return classes


def result_table(results: Sequence[FolderResult], num_classes: int) -> list[str]:
    """Lines: a folder each, and their mean where there are several."""
    partly = any(result.among is not None for result in results)
    head = f"{'images':>8} {'classes':>8} {'top-1':>7} {'top-5':>7} {'loss':>7}"
    lines = [head + (f" {'top-1 *':>8} {'top-5 *':>8}" if partly else "") + "  folder"]
    rows = []
    for result in results:
        own, among = result.predictions, result.among or result.predictions
        rows.append((own.top(1), own.top(5), own.mean_loss, among.top(1), among.top(5)))
        left_out = int((~own.readable).sum())
        note = f" ({left_out} unreadable left out)" if left_out else ""
        count = f"{int(own.readable.sum()):8d} {result.classes:8d}"
        lines.append(f"{count} {_numbers(rows[-1], partly=partly)}  {result.name}{note}")
    if len(results) > 1:
        mean = np.mean(rows, axis=0).tolist()
        lines.append(f"{'':8} {'':8} {_numbers(mean, partly=partly)}  mean of {len(results)} folders")
    if partly:
        lines.append(f"* among the classes that the folder has, of the model's {num_classes}")
    return lines


def _numbers(row: Sequence[float], *, partly: bool) -> str:
    top1, top5, loss, among1, among5 = row
    return f"{top1:7.2f} {top5:7.2f} {loss:7.4f}" + (f" {among1:8.2f} {among5:8.2f}" if partly else "")
