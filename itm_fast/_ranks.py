"""The processes of one run, which torchrun starts one for each device, and what they exchange."""

from __future__ import annotations

import contextlib
import contextvars
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
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
    """The processes of a run, or those of it on one machine, as one of them sees them.

    Attributes:
        rank: number of this process.
        world: how many there are, W.
        group: their process group; None: that of all processes.
        node: the processes on this process's machine; None: this process alone.

    >>> Ranks().first, Ranks().most(3)
    (True, 3)
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    node: Ranks | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints, and writes all files."""
        return self.rank == 0

    @property
    def shared(self) -> bool:
        """Whether this machine has several of the processes."""
        return self.node is not None and self.node.world > 1

    def most(self, value: Number, meanwhile: Callable[[], None] | None = None) -> Number:
        """The largest value of any process.

        Args:
            value: of this process.
            meanwhile: called ten times a second while other processes have not come so far; signals are handled then.
        """
        if self.world == 1:
            return value
        found = torch.tensor(float(value), dtype=torch.float64)
        work = dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group, async_op=meanwhile is not None)
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
        found = self.each(value)
        if any(other != found[0] for other in found):
            each = ", ".join(f"{other} in process {number}" for number, other in enumerate(found))
            raise ValueError(f"all processes must have the same {what}, got {each}")

    def each(self, value: Made) -> list[Made]:
        """The values of all processes, in all of them, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, self.group)
        return found

    def on_first(self, function: Callable[[], Made]) -> Made:
        """Call a function in the process of rank 0 and return its result, which must be plain values, in all.

        Raises:
            ChildProcessError: in the other processes, if the function raised in that of rank 0.
        """
        if self.world == 1:
            return function()
        found: list[Any] = [None, "failed"]
        if not self.first:
            dist.broadcast_object_list(found, self._global(0), self.group)
            if found[1] is not None:
                raise ChildProcessError("stopped, because the process of rank 0 could not continue")
            return found[0]
        try:
            found = [function(), None]
            return found[0]
        finally:
            dist.broadcast_object_list(found, self._global(0), self.group)

    def add_up(self, dump: Callable[[], bytes], add: Callable[[bytes], None]) -> None:
        """Add up what all processes have, in the process of rank 0.

        Processes add up in pairs, then pairs of pairs: after log2(W) rounds the first has the sum, and none has held
        the values of more than one other process at a time.

        Args:
            dump: what this process has, with what it was given, as bytes.
            add: add what another process has.
        """
        step = 1
        while step < self.world and self.rank % step == 0:
            if self.rank % (2 * step):
                data = torch.frombuffer(bytearray(dump()), dtype=torch.uint8)
                to = self._global(self.rank - step)
                dist.send(torch.tensor(len(data)), to, self.group)
                dist.send(data, to, self.group)
                return
            if self.rank + step < self.world:
                source, length = self._global(self.rank + step), torch.zeros((), dtype=torch.int64)
                dist.recv(length, source, self.group)
                found = torch.empty(int(length), dtype=torch.uint8)
                dist.recv(found, source, self.group)
                add(found.numpy().tobytes())
            step *= 2

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

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


_machine: contextvars.ContextVar[Ranks | None] = contextvars.ContextVar("itm_fast_machine", default=None)


def local_world() -> int:
    """Number of processes of this run on this machine, which share its memory."""
    machine = _machine.get()
    return _torchrun.local_world() if machine is None else machine.world


def own_group() -> int | None:
    """This process's rank in a process group that the program made itself; None without one, or under torchrun."""
    there = dist.is_available() and dist.is_initialized() and _torchrun.world() == 1
    return dist.get_rank() if there else None


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started together with this one; without torchrun there is this one alone.

    A process group of torch.distributed that exists already is used, and left as it is. Sets the number of threads to
    this process's share of the cores, unless OMP_NUM_THREADS says more than 1 (torchrun sets it to 1); processes that
    torchrun did not start have their own number again afterwards, and never a larger one.

    Args:
        device: where this process computes; all must be on the CPU, or each on a GPU of its own.

    Raises:
        ValueError: some processes are on a CPU and some on a GPU, two are on the same GPU, or a process group has no
            backend for the CPU.
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
        if device.type == "cuda":
            torch.cuda.set_device(device)
        kind = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(kind, timeout=_PATIENCE)
    threads, token, node = torch.get_num_threads(), None, None
    try:
        alone = Ranks(dist.get_rank(), dist.get_world_size())
        alone.same("kind of device", device.type)
        node = _on_this_machine(alone)
        _require_own_gpus(node, device)
        if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            share = max(1, _cores() // node.world)
            torch.set_num_threads(min(share, threads) if there else share)
        token = _machine.set(node)
        yield Ranks(alone.rank, alone.world, None, node)
    except RuntimeError as error:
        if ranks_lost(error):
            raise ConnectionError("stopped, because another process of this run has ended") from error
        raise
    finally:
        if token is not None:
            _machine.reset(token)
        if not there:
            dist.destroy_process_group()
        else:
            torch.set_num_threads(threads)
            if node is not None and node.group is not None:
                dist.destroy_process_group(node.group)


def _on_this_machine(ranks: Ranks) -> Ranks:
    """Those of the processes that see the same files and share the memory of one machine."""
    names = ranks.each(_machine_name())
    nodes = [[rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]
    # All processes must make all groups, in the same order.
    groups = [None if len(nodes) == 1 else dist.new_group(node, backend="gloo", timeout=_PATIENCE) for node in nodes]
    number = next(number for number, node in enumerate(nodes) if ranks.rank in node)
    return Ranks(nodes[number].index(ranks.rank), len(nodes[number]), groups[number])


def _machine_name() -> str:
    """A name that two processes share if they are on the same machine, and in the same container."""
    found = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/mnt")):
        with contextlib.suppress(OSError):  # not Linux
            found.append(read().strip())
    return " ".join(found)


def _require_own_gpus(node: Ranks, device: torch.device) -> None:
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    names = node.each(str(uuid) if uuid else f"{index} of {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    if len(set(names)) < len(names):
        raise ValueError(
            f"processes of this machine share a GPU ({device}), and each needs its own; call "
            "torch.cuda.set_device(local rank) in each process before it loads a model, or give each another device"
        )


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
