"""Batches on the device before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A batch that knows its tensors (``mae_transfer.data.batches.Batch``)."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self: ...

    def tensors(self) -> dict[str, Tensor]: ...


MovableT = TypeVar("MovableT", bound=Movable)


def prefetch(batches: Iterator[MovableT], device: torch.device) -> Iterator[MovableT]:
    """The same batches, copied to ``device`` one ahead.

    On a GPU the copy of the next batch runs on a stream of its own while the current one is computed on; pinned
    memory lets it. On a CPU a batch is where it should be already, and is handed on when it is asked for.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)

    def fetch() -> MovableT | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(copying):
            return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    following = fetch()
    while following is not None:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        current = following
        for tensor in current.tensors().values():
            tensor.record_stream(computing)  # its memory is not given away before it was used
        following = fetch()
        yield current
