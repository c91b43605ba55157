"""What goes on from the weights that a training started from to those that it writes: where they are from, and the
licence that they came with."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from mae_transfer.checkpoint.read import read_checkpoint
from mae_transfer.errors import CheckpointError

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=4)  # a run asks with every training state
def lineage(path: str | Path | None) -> dict[str, str]:
    """Fields of ``EncoderInfo`` for what is trained from ``path``: none for random weights, or where nothing is known.

    A checkpoint that is gone when a run goes on is said in the log, and nothing goes on from it.
    """
    if path is None:
        return {}
    try:
        info = read_checkpoint(path).info
    except CheckpointError as error:
        logger.warning("source and licence of the initial weights are not known any more: %s", error)
        return {}
    return {name: value for name, value in (("source", info.source), ("license", info.license)) if value}
