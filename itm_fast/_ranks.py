"""The processes of one run, which torchrun starts one for each device, and what they exchange."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import _torchrun

_PATIENCE = timedelta(days=1)  # others wait while rank 0 writes files; torchrun notices processes that have ended
Made = TypeVar("Made")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process.
        world: how many there are, W.

    >>> Ranks().first, Ranks().most(3)
    (True, 3)
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process prints, and writes all files."""
        return self.rank == 0

    def most(self, value: Number, meanwhile: Callable[[], None] | None = None) -> Number:
        """The largest value of any process.

        Args:
            value: of this process.
            meanwhile: called ten times a second while other processes have not come so far; signals are handled then.
        """
        if self.world == 1:
            return value
        found = torch.tensor(float(value), dtype=torch.float64)
        work = dist.all_reduce(found, dist.ReduceOp.MAX, async_op=meanwhile is not None)
        while meanwhile is not None and not work.is_completed():
            meanwhile()
            time.sleep(0.1)
        if work is not None:
            work.wait()
        return type(value)(found.item())

    def same(self, what: str, value: Any) -> None:
        """Refuse a value that is not the same in all processes.

        Raises:
            ValueError: names `what` and the values.
        """
        if self.world == 1:
            return
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            each = ", ".join(f"{other} in process {number}" for number, other in enumerate(found))
            raise ValueError(f"all processes must have the same {what}, got {each}")

    def on_first(self, function: Callable[[], Made]) -> Made:
        """Call a function in the process of rank 0 and return its result, which must be plain values, in all.

        Raises:
            ChildProcessError: in the other processes, if the function raised in that of rank 0.
        """
        if self.world == 1:
            return function()
        found: list[Any] = [None, "failed"]
        if not self.first:
            dist.broadcast_object_list(found, 0)
            if found[1] is not None:
                raise ChildProcessError("stopped, because the process of rank 0 could not continue")
            return found[0]
        try:
            found = [function(), None]
            return found[0]
        finally:
            dist.broadcast_object_list(found, 0)

    def to_first(self, value: Made) -> list[Made] | None:
        """The values of all processes, in the process of rank 0; None in the others."""
        found: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, found)
        return found

    def store(self, name: str) -> dist.Store:
        """The store that the processes share, for keys that begin with this name."""
        return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all processes, one process after another; differentiable.

        Args:
            x: this process's rows, [counts[rank], ...].
            counts: [W], the number of rows of each process.

        Returns:
            [sum of counts, ...].
        """
        return _Gathered.apply(x, tuple(counts), self.rank)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes; differentiable."""
        return _Summed.apply(x)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Set tensors to their averages over all processes: by one all_reduce of all of them in their order.

        DistributedDataParallel would begin during the backward pass, but after its first step it changes the order, and
        with it the rounding, so that a resumed run would not be the same as one that was not interrupted.
        """
        if self.world == 1 or not tensors:
            return
        total = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(total)
        total /= self.world
        for x, mean in zip(tensors, total.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started together with this one; without torchrun there is this one alone.

    A process group of torch.distributed that exists already is used, and left as it is. Sets the number of threads to
    this process's share of the cores, unless OMP_NUM_THREADS says more than 1 (torchrun sets it to 1).

    Args:
        device: where this process computes; all must be on the CPU, or each on a GPU of its own.

    Raises:
        ValueError: some processes are on a CPU and some on a GPU, or a process group has no backend for the CPU.
        ConnectionError: another process has ended.
    """
    there = dist.is_available() and dist.is_initialized()
    if there and dist.get_backend() == "nccl":
        raise ValueError(
            "the process group has NCCL alone, and numbers are exchanged on the CPU too; make it by "
            'torch.distributed.init_process_group("cpu:gloo,cuda:nccl")'
        )
    if not there and _torchrun.world() == 1:
        yield Ranks()
        return
    if not there:
        if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, _cores() // _torchrun.local_world()))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        kind = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(kind, timeout=_PATIENCE)
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        ranks.same("kind of device", device.type)
        yield ranks
    except RuntimeError as error:
        if ranks_lost(error):
            raise ConnectionError("stopped, because another process of this run has ended") from error
        raise
    finally:
        if not there:
            dist.destroy_process_group()


def ranks_lost(error: RuntimeError) -> bool:
    """Whether gloo or NCCL reports that another process is gone."""
    text = str(error)
    return any(words in text for words in ("closed by peer", "reset by peer", "remote process exited", "Broken pipe"))


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        most = max(counts)
        mine = x.new_zeros(most, *x.shape[1:])
        mine[: len(x)] = x
        found = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(found, mine)
        return torch.cat([rows[:count] for rows, count in zip(found, counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        counts, rank = ctx.counts, ctx.rank
        parts = grad.contiguous().split(counts)
        if grad.device.type == "cpu":  # gloo has no reduce_scatter in all versions of torch
            total = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total)
            return total.split(counts)[rank], None, None
        most = max(counts)
        padded = [torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]) for part in parts]
        mine = torch.empty_like(padded[0])
        dist.reduce_scatter(mine, padded)
        return mine[: counts[rank]], None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
