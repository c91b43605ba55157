"""Which images are looked at, by which process, and what their labels are called."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.source import Source
from mae_transfer.engine.distribution import Processes
from mae_transfer.errors import ConfigError


def choose_images(num_images: int, *, limit: int, seed: int) -> list[int]:
    """At most ``limit`` of the images, spread over all folders: a random choice that depends on the seed alone."""
    if num_images <= limit:
        return list(range(num_images))
    words = Draws(seed=seed, purpose=Purpose.EVALUATION_CHOICE).words(num_images)
    return sorted(np.argsort(words, kind="stable")[:limit].tolist())


BATCH = 64  # images at once in evaluation


def shares(count: int, processes: Processes) -> Iterator[tuple[range, bool]]:
    """This process's batches of images 0 to ``count`` − 1, and whether a batch counts.

    Every process gets equally many, as a sharded model's forward pass needs them all: who would have one batch less
    does the first one once more, for nothing.
    """
    size = min(BATCH, -(-count // processes.world_size))
    num_batches = -(-count // size)
    rounds = -(-num_batches // processes.world_size)
    for batch in range(processes.rank, rounds * processes.world_size, processes.world_size):
        start = batch * size if batch < num_batches else 0
        yield range(start, min(start + size, count)), batch < num_batches


def matching_labels(train: Source, val: Source, *, keys: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) of both, numbered by the classes of ``train``.

    Args:
        keys: what the two were given as, for the message.

    Raises:
        ConfigError: images without labels, a single class, or classes that only ``val`` has.
    """
    for key, source in zip(keys, (train, val), strict=True):
        if source.labels is None:
            raise ConfigError(
                f"{key} has no labels; a folder of images for each class is needed (or shards or tables that hold "
                "labels)"
            )
    assert train.labels is not None and val.labels is not None
    if train.classes is not None and len(train.classes) == 1:
        raise ConfigError(
            f"{keys[0]} has only one class folder ({train.classes[0]}); a folder of images for each class is needed"
        )
    if train.classes is None or val.classes is None:  # numbers without names: the same numbers mean the same
        return train.labels, val.labels
    numbers = {name: number for number, name in enumerate(train.classes)}
    unknown = [name for name in val.classes if name not in numbers]
    if unknown:
        raise ConfigError(f"{keys[1]} has classes that {keys[0]} lacks: {', '.join(unknown[:5])}")
    return train.labels, np.array([numbers[name] for name in val.classes], np.int64)[val.labels]
