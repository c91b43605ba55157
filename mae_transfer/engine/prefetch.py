"""Batches on the device before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

BatchT = TypeVar("BatchT")


def prefetch(
    batches: Iterator[BatchT], device: torch.device, *, move: Callable[[BatchT], BatchT], used: Callable[[BatchT], None]
) -> Iterator[BatchT]:
    """The same batches, copied to ``device`` one ahead.

    On a GPU the copy of the next batch runs on a stream of its own while the current one is computed on; pinned
    memory lets it. On a CPU a batch is where it should be already, and is handed on when it is asked for.

    Args:
        move: a batch's copy on the device, started without waiting.
        used: told on the computing stream that a batch is used there, so that its memory is not given away before
            (``Tensor.record_stream`` for each of its tensors).
    """
    if device.type != "cuda":
        for batch in batches:
            yield move(batch)
        return
    copying = torch.cuda.Stream(device)

    def fetch() -> BatchT | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(copying):
            return move(batch)

    following = fetch()
    while following is not None:
        torch.cuda.current_stream(device).wait_stream(copying)
        current = following
        used(current)
        following = fetch()
        yield current
