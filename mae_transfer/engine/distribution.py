"""One process or several (torchrun): device, rank, and agreement between processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mae_transfer.errors import ConfigError, UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run.

    Attributes:
        control: a group on the CPU for what is said beside training: agreements, never gradients.
        saving: another one, for the threads that write checkpoints.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = field(default=None, repr=False)
    saving: dist.ProcessGroup | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over processes, in place."""
        if self.is_distributed:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over processes, in place."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process. All of them must call this at the same place."""
        return bool(self.largest([int(flag)])[0])

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each number over processes. All of them must call this at the same place."""
        if not self.is_distributed:
            return list(values)
        numbers = torch.tensor(values)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.control)
        return numbers.tolist()

    def on_main(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the main process; what it returns, or the user's mistake it raises, holds everywhere.

        All processes call this together. Small objects of our own making only.
        """
        if not self.is_distributed:
            return function()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except UserError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.control)
        result, mistake = box
        if mistake is not None:
            raise mistake
        return result

    def gather(self, value: Any) -> list[Any]:
        """What every process has, everywhere, by rank. Small objects of our own making only."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier(group=self.control)


class Agreement:
    """What processes tell each other once a step without waiting for it.

    Numbers given in one step are exchanged on the CPU while the next one computes, and read a step later, when they
    have long arrived: no process and no device waits, and all processes learn of a thing at the same step. A process
    that is alone learns at once.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._numbers: Tensor | None = None
        self._work: dist.Work | None = None

    def exchange(self, values: Sequence[int]) -> list[int] | None:
        """Give this step's numbers; get the largest of each that any process gave in the last. None the first time."""
        if not self._processes.is_distributed:
            return list(values)
        before = self.finish()
        self._numbers = torch.tensor(values)
        self._work = dist.all_reduce(self._numbers, op=dist.ReduceOp.MAX, group=self._processes.control, async_op=True)
        return before

    def finish(self) -> list[int] | None:
        """Wait for what is under way. Needed before the group is used for anything else."""
        if self._work is None or self._numbers is None:
            return None
        self._work.wait()
        self._work = None
        return self._numbers.tolist()


def _fresh_store() -> dist.Store:
    """Where processes find each other, without what those before a restart have left there.

    torchrun of PyTorch 2.14 serves the same store after a restart, and processes would connect to the addresses of
    dead ones. On one machine the number of restarts tells the attempts apart; on several it differs from machine to
    machine, and the launch scripts turn the sharing off (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    store, _, _ = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _cpu_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every process is a member
    return group


def is_restart() -> bool:
    """Whether torchrun has started these processes anew after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the process group that torchrun describes in the environment, or run alone.

    Raises:
        ConfigError: a GPU was asked for and there is none, or there are fewer GPUs than processes.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"train.device={device}; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, and torch sees no GPU; use train.device=cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
    else:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU of its own: torch sees {torch.cuda.device_count()}; "
                "lower torchrun's --nproc-per-node"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(device=chosen)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=_fresh_store(),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield Processes(
            device=chosen,
            rank=dist.get_rank(),
            local_rank=local_rank,
            world_size=world_size,
            control=_cpu_group(),
            saving=_cpu_group(),
        )
    finally:
        dist.destroy_process_group()
