"""Weighted nearest neighbours (Wu et al. 2018): what features tell without any training.

Every training image votes for its class with exp(cosine similarity / temperature); the k most similar ones are asked.
The features of MAE do badly here by nature (about 11 % where fine-tuning gives 81 %, on ImageNet with ViT-B): it is a
way to compare features, not a measure of what can be learned from them.

Shapes: n images asked about, N training images, D width, c classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_transfer.classification.features import encode
from mae_transfer.classification.metrics import Collector, Predictions
from mae_transfer.classification.setting import Setting
from mae_transfer.data.source import Source
from mae_transfer.errors import ConfigError

if TYPE_CHECKING:
    from mae_transfer.classification.objective import ClassificationRun

logger = logging.getLogger(__name__)

#: What similarities may take at a time: n is cut so that n · N numbers stay below.
CHUNK_BYTES = 256 * 2**20


def knn_scores(
    features: Tensor,
    *,
    train_features: Tensor,
    train_labels: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    own: Tensor | None = None,
) -> Iterator[tuple[range, dict[int, Tensor]]]:
    """The votes for each class, a part of the images at a time.

    Needs the training features twice, as given and with length 1 (2 · 3.7 GiB for the 1.28 million images of ImageNet
    and ViT-B), and ``CHUNK_BYTES`` for similarities, on the device of the features.

    Args:
        features: (n, D), of any length; only their direction counts.
        train_features: (N, D). train_labels: (N,) int64.
        ks: how many neighbours are asked, each from 1 to N (N − 1 with ``own``).
        own: (n,) the number of the training image that an image is itself, −1 where it is none: it is not asked.

    Yields:
        Which images, and for each k their votes (m, c); relative to the nearest neighbour's vote, and −inf for a class
        without any.

    Raises:
        ConfigError: a k that is larger than the number of neighbours there are.
    """
    most = len(train_features) - (0 if own is None else 1)
    for k in ks:
        if not 1 <= k <= most:
            raise ConfigError(f"knn.k={k}: expected 1 to {most}, as there are {most} training images to ask")
    train = F.normalize(train_features.float(), dim=1)
    chunk = max(1, CHUNK_BYTES // (4 * len(train)))
    for start in range(0, len(features), chunk):
        places = range(start, min(start + chunk, len(features)))
        similar = F.normalize(features[start : places.stop].float(), dim=1) @ train.T  # (m, N)
        if own is not None:
            mine = own[start : places.stop]
            known = (mine >= 0).nonzero()[:, 0]
            similar[known, mine[known]] = -torch.inf
        nearest, neighbours = similar.topk(max(ks), dim=1)  # (m, k), most similar first
        votes = ((nearest - nearest[:, :1]) / temperature).exp()
        voted = train_labels[neighbours]
        result = {}
        for k in ks:
            scores = votes.new_zeros(len(places), num_classes).scatter_add_(1, voted[:, :k], votes[:, :k])
            result[k] = scores.masked_fill(scores == 0, -torch.inf)
        yield places, result


def run_knn(run: ClassificationRun) -> tuple[dict[str, float], Predictions]:
    """Neighbours among the training images for every image of ``data.val``; all processes call this.

    Returns:
        ``val_top1`` and ``val_top5`` of the best k, with ``knn_k``, and ``knn_top1_k{k}`` of each; predictions of the
        best k.

    Raises:
        ConfigError: a k larger than the training set. RunFailed: too many unreadable images.
    """
    setting = Setting.of(run)
    train, asked = encode(setting, run.source, "data.train"), encode(setting, run.val_source, "data.val")
    rows = np.flatnonzero(train.readable)
    own = _own_numbers(run, rows)
    device, config = run.processes.device, run.config.knn
    collectors = {k: Collector(run.val_labels, num_classes=run.model.num_classes) for k in config.k}
    # Consecutive shares: each process asks for its own images, all of them know all training images.
    share = -(-len(asked.features) // run.processes.world_size)
    first = min(run.processes.rank * share, len(asked.features))
    last = min(first + share, len(asked.features))
    for places, scores in knn_scores(
        asked.features[first:last].to(device),
        train_features=train.features[torch.from_numpy(rows)].to(device),
        train_labels=torch.from_numpy(run.labels[rows]).to(device),
        num_classes=run.model.num_classes,
        ks=config.k,
        temperature=config.temperature,
        own=None if own is None else own[first:last].to(device),
    ):
        indices = range(first + places.start, first + places.stop)
        for k, votes in scores.items():
            collectors[k].add(indices, votes, asked.readable[indices.start : indices.stop], are_logits=False)
    found = {k: collector.finish(run.processes) for k, collector in collectors.items()}
    for k, predictions in found.items():
        logger.info("%d nearest neighbours: %s", k, predictions.summary())
    best = max(found, key=lambda k: found[k].top(1))
    numbers = {"val_top1": found[best].top(1), "val_top5": found[best].top(5), "knn_k": float(best)}
    return numbers | {f"knn_top1_k{k}": predictions.top(1) for k, predictions in found.items()}, found[best]


def _own_numbers(run: ClassificationRun, rows: np.ndarray) -> Tensor | None:
    """For each image of ``data.val`` its place among the training images ``rows``, −1 where it is none of them; None
    where none is."""
    places = {file: place for place, file in enumerate(real_places(run.source, rows.tolist()))}
    own = [places.get(file, -1) for file in real_places(run.val_source, range(len(run.val_source)))]
    if max(own) < 0:
        return None
    logger.info("%d images of data.val are training images too; none is asked about itself", sum(i >= 0 for i in own))
    return torch.tensor(own)


def real_places(source: Source, indices: Iterable[int]) -> Iterator[tuple[str, int]]:
    """``Source.place`` of images, the same however the path is spelt, through links or from another folder."""
    folders: dict[str, str] = {}
    for index in indices:
        path, number = source.place(index)
        folder, name = os.path.split(path)
        if folder not in folders:  # once a folder: its images are many
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)  # noqa: PTH118 - once an image, and ten times as fast
        yield os.path.realpath(path) if os.path.islink(path) else path, number  # noqa: PTH114
