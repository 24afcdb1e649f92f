"""What each launch of a Triton kernel moves and computes, from the arguments that its launcher gave.

`launches` runs an op's own launchers and keeps their launches in place of running them, so grids, tiles and pieces are
those of the code. `COUNTS` has one function for each kernel of the pair scorers, from `traffic_forward` and
`traffic_backward`: what its programs load, store and multiply, in the forms that these ops use.

- Requested bytes: all loads and stores of all programs. L1 is taken to hold nothing. Masked elements are left out, and
  neighbours in a row of a tile that have one address count once.
- Distinct bytes: each element that a launch touches, once.
- Left out: int32 and int64 tables (where sets begin, who owns a row): a few bytes a row of hundreds. Also rare branches
  that the data choose: |P|^2 computed again where it cancels, and NaN. And the operations that split the factors of
  3xTF32.
- Vector instructions are an estimate for the published models' options: in the loops over elements, a float32 addition,
  product, comparison, conversion, exponential, root, division or term of a sum counts 1.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from itm_fast.kernels import _launch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.jit import KernelInterface

from benchmarks import traffic_backward, traffic_forward
from benchmarks.traffic_counts import Count
from itm_fast.ops._declare import DECLARED, Floats

COUNTS = traffic_forward.COUNTS | traffic_backward.COUNTS


class Memory:
    """Numbers for the tensors' memory: a new one takes that of one of its size that is gone, as PyTorch does."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[StorageWeakRef, int, int]] = {}  # by where a storage lies: its number and bytes
        self.free: dict[int, list[int]] = {}  # by bytes
        self.next = itertools.count()

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """The number of a tensor's memory, and where the tensor begins in it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            for key in [key for key, (storage_, *_) in self.live.items() if storage_.expired()]:
                _, number, size = self.live.pop(key)
                self.free.setdefault(size, []).append(number)
            gone = self.free.get(storage.nbytes())
            number = gone.pop() if gone else next(self.next)
            self.live[storage._cdata] = StorageWeakRef(storage), number, storage.nbytes()
        return self.live[storage._cdata][1], tensor.storage_offset()


class Launch:
    """A launch: its kernel's arguments as attributes, and the count that the kernel's function fills."""

    def __init__(
        self, memory: Memory, names: list[str], grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ):
        self.__dict__.update(zip(names, args), **constants)
        self.memory, self.count = memory, Count(grid[0])

    def reads(self, name: str, distinct: int, requested: int, *part: int) -> None:
        """Reads of an argument, in elements; `part` tells those of its rows that are used from others."""
        tensor = getattr(self, name)
        size = tensor.element_size()
        self.count.reads((*self.memory.place(tensor), *part), size * int(distinct), size * int(requested))

    def writes(self, name: str, elements: int, *part: int) -> None:
        tensor = getattr(self, name)
        self.count.writes((*self.memory.place(tensor), *part), tensor.element_size() * int(elements))


def launches(op: str, arch: int, given: list[Any]) -> Iterator[tuple[str, Count]]:
    """Every launch of an op's forward pass: the kernel's name, and its count. No kernel runs.

    Args:
        op: name of the op.
        arch: whose tiles are taken, of kernels/_tiles.py.
        given: the op's arguments, in the order of its declaration, on the CPU; features need hold no values.
    """
    with recording(arch) as found:
        DECLARED[op].implementation("triton").forward(*given)
    return iter(found)


@contextmanager
def recording(
    arch: int, run: Callable[..., Any] | None = None, memory: Memory | None = None
) -> Iterator[list[tuple[str, Count]]]:
    """Count the launches inside the `with` in place of running them, or with `run(kernel, grid, args, constants)`.

    Args:
        arch: whose tiles are taken, of kernels/_tiles.py.
        run: runs a launch.
        memory: numbers of the tensors' memory; else new ones.

    Raises:
        KeyError: a kernel has no function in `COUNTS`.
    """
    found: list[tuple[str, Count]] = []
    numbers = memory or Memory()

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            with _disable_current_modes():  # one may count operations of PyTorch: not those here
                one = Launch(numbers, kernel.arg_names, grid, args, constants)
                COUNTS[kernel.__name__](one)
            found.append((kernel.__name__, one.count))
            if run is not None:
                run(kernel, grid, args, constants)

        return launch

    patched = mock.patch.object(KernelInterface, "__getitem__", launcher)
    with patched, mock.patch.object(_launch, "arch", return_value=arch):
        yield found


def arguments(op: str, sizes: dict[str, int], dtype: torch.dtype, lengths: list[int], **given: Any) -> list[Any]:
    """An op's arguments without values: each tensor of floats has its declared shape, and memory that nobody touches.

    Args:
        op: name of the op.
        sizes: the letters of the shapes.
        dtype: of the tensors of floats.
        lengths: words of each caption.
        given: those that are no tensors of floats, but for `cu_seqlens` and `region_lengths`; else the op's defaults.
    """
    parameters = inspect.signature(DECLARED[op].function).parameters.values()
    edge = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    given = {p.name: p.default for p in parameters} | given | {"cu_seqlens": edge, "region_lengths": None}
    sizes = sizes | {"T": len(lengths), "N": sum(lengths)}
    found: list[Any] = []
    for argument in DECLARED[op].arguments:
        if isinstance(argument, Floats):
            shape = [sizes[x] if x in sizes else int(x) for x in argument.letters.split()]
            found.append(torch.empty(shape, dtype=dtype))
        else:
            found.append(given[argument.name])
    return found
