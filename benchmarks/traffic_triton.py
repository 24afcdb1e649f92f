"""What each launch of a Triton kernel moves and computes in a forward pass, from the arguments that its launcher gave.

`launches` runs an op's own launchers and keeps their launches in place of running them, so grids, tiles and pieces are
those of the code. `COUNTS` has one function for each kernel of the pair scorers: what its programs load, store and
multiply, in the forms that these ops use.

- Requested bytes: all loads and stores of all programs, masked elements left out. L1 is taken to hold nothing.
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
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from itm_fast.kernels import _launch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from benchmarks.traffic_counts import Count, blocks
from itm_fast.ops._declare import DECLARED, Floats


class Memory:
    """Numbers for the tensors' memory: a new tensor takes that of one of its size that is gone, as PyTorch does."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}  # by the address of a tensor that lives
        self.free: dict[int, list[int]] = {}  # by bytes
        self.next = itertools.count()

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """The number of a tensor's memory, and where the tensor begins in it."""
        whole = tensor if tensor._base is None else tensor._base
        key, size = whole.data_ptr(), whole.nbytes
        if key not in self.numbers:
            gone = self.free.setdefault(size, [])
            self.numbers[key] = gone.pop() if gone else next(self.next)
            weakref.finalize(whole, lambda: gone.append(self.numbers.pop(key))).atexit = False
        return self.numbers[key], tensor.storage_offset()


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


def kind(dtype: torch.dtype, precision: str) -> str:
    """The kind of a product of two tiles of `dtype`."""
    return precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def _sizes(count: Tensor, sets: slice) -> Tensor:
    return count[sets].long()


def _half(tensor: Tensor) -> int:
    """1 where an element is converted to or from float32, else 0."""
    return int(tensor.dtype != torch.float32)


def _affinity(a: Any) -> None:
    tiles = a.count.programs
    a.reads("query_ptr", a.queries * a.D, tiles * a.BLOCK_M * a.D, a.query_first, a.queries)
    a.reads("context_ptr", a.contexts * a.D, tiles * a.BLOCK_N * a.D, a.context_first, a.contexts)
    a.writes("out_ptr", a.queries * a.contexts)
    depth = blocks(a.D, a.BLOCK_K) * a.BLOCK_K
    a.count.dots(tiles, a.BLOCK_M, a.BLOCK_N, depth, kind(a.query_ptr.dtype, a.PRECISION))


def _gram(a: Any) -> None:
    sets = a.count.programs // a.chunks**2
    size = _sizes(a.count_ptr, slice(a.set_first, a.set_first + sets))
    tiles = int((blocks(size, a.BLOCK_X) ** 2).sum())
    rows = int(size.sum())
    a.reads("row_ptr", rows * a.D, tiles * 2 * a.BLOCK_X * a.D, a.row_first, rows)
    a.writes("out_ptr", int((size**2).sum()))
    depth = blocks(a.D, a.BLOCK_K) * a.BLOCK_K
    a.count.dots(tiles, a.BLOCK_X, a.BLOCK_X, depth, kind(a.row_ptr.dtype, a.PRECISION))


def _lengths(a: Any) -> None:
    a.reads("row_ptr", a.rows * a.D, a.rows * a.D)
    a.writes("out_ptr", a.rows)
    a.count.vector = a.count.programs * a.BLOCK_M * a.BLOCK_K * (blocks(a.D, a.BLOCK_K) * (2 + _half(a.row_ptr)) + 1)


def _query_norms(a: Any) -> None:
    size = _sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    a.reads("logits_ptr", size.sum() * a.contexts, size.sum() * a.contexts)
    a.writes("out_ptr", a.sets * a.contexts)
    a.count.vector = _padded(size, a.SETS, a.BLOCK_Q) * blocks(a.contexts, a.BLOCK_X) * a.BLOCK_X * 5


def _padded(size: Tensor, sets: int, rows: int) -> int:
    """Rows that programs of `sets` sets go through, `rows` of each set at a time."""
    filled = torch.nn.functional.pad(size, (0, -len(size) % sets))
    return int((blocks(filled.view(-1, sets).amax(1), rows) * rows * sets).sum())


def _attend(a: Any) -> None:
    size = _sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    tiles = blocks(a.queries, a.BLOCK_Q)
    parts = blocks(size, a.BLOCK_X) if not a.WHOLE else torch.ones_like(size)
    # A set of several tiles is read again to tell which contexts are kept and what these add up to, for each tile of
    # G's columns and with these, and to store e.
    rule = {"softmax": 0, "hard": 1, "threshold": 1}.get(a.WEIGHTS, 2) + int(a.MODE == "weights")
    again = torch.where(parts == 1, 0, rule + (parts + 1 if a.GRAM else 0 * parts))
    passes = (1 + again) * size
    rows = tiles * a.BLOCK_Q
    contexts = int(size.sum())
    a.reads("logits_ptr", a.queries * contexts, rows * passes.sum())
    if a.NORM != "none":
        first, last = a.owner_ptr[[a.query_first, a.query_first + a.queries - 1]].tolist()
        a.reads("norm_ptr", (last - first + 1) * contexts, rows * passes.sum())
    if a.GRAM:
        a.reads("gram_ptr", (size**2).sum(), tiles * (size**2 + size).sum())
        products = tiles * int((parts**2).sum())
        a.count.dots(products, a.BLOCK_Q, a.BLOCK_X, a.BLOCK_X, kind(torch.float32, a.PRECISION))
    if a.MODE == "score" and a.GRAM:
        a.reads("length_ptr", a.queries, rows * a.sets, a.query_first, a.queries)
    if a.MODE != "score":
        a.writes("alpha_ptr", a.queries * contexts)
    a.writes("out_ptr", a.queries * a.sets)
    a.count.vector = rows * a.BLOCK_X * int((parts * (12 + 6 * again)).sum())


def _pool(a: Any) -> None:
    size = _sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    a.reads("r_ptr", size.sum() * a.columns, size.sum() * a.columns)
    a.writes("out_ptr", a.sets * a.columns)
    a.count.vector = _padded(size, a.SETS, a.BLOCK_Q) * blocks(a.columns, a.BLOCK_B) * a.BLOCK_B * 5


def _project(a: Any) -> None:
    size = _sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    tiles, contexts = blocks(a.queries, a.BLOCK_Q), int(size.sum())
    outs = blocks(a.S, a.BLOCK_S)
    passes = outs if outs == 1 else 2 * outs  # over D: a wide S takes two sweeps
    steps, rows = blocks(a.D, a.BLOCK_K), tiles * a.BLOCK_Q
    which, half = kind(a.query_ptr.dtype, a.PRECISION), _half(a.query_ptr)
    chunks = torch.full_like(size, blocks(a.ROWS, a.BLOCK_X)) if a.WHOLE else blocks(size, a.BLOCK_X)
    if not a.GLOBAL:
        again = 1 if a.WHOLE and a.BLOCK_X == a.ROWS else passes * steps
        a.reads("alpha_ptr", a.queries * contexts, rows * contexts * again)
        a.reads("inverse_ptr", a.queries * a.sets, rows * a.sets)
        a.count.dots(tiles * passes * steps * int(chunks.sum()), a.BLOCK_Q, a.BLOCK_K, a.BLOCK_X, which)
    loaded = a.sets if a.GLOBAL else int(chunks.sum()) * a.BLOCK_X
    first = int(a.start_ptr[a.set_first])
    a.reads("context_ptr", contexts * a.D, tiles * passes * loaded * a.D, first, contexts)
    a.reads("query_ptr", a.queries * a.D, rows * a.sets * passes * a.D, a.query_first, a.queries)
    programs = a.count.programs
    a.reads("weight_ptr", a.S * a.D, programs * passes * a.BLOCK_S * a.D)
    a.reads("bias_ptr", a.S, programs * passes * a.BLOCK_S)
    a.writes("out_ptr", a.queries * a.sets * a.S)
    a.count.dots(programs * passes * steps, a.BLOCK_Q, a.BLOCK_S, a.BLOCK_K, which)
    each = passes * (steps * a.BLOCK_K * (3 + 2 * half) + a.BLOCK_S) + outs * a.BLOCK_S * (3 + half)
    a.count.vector = programs * a.BLOCK_Q * each


def _step(a: Any) -> None:
    parts = a.BLOCK_N // a.BLOCK_Q
    programs = a.count.programs
    images = programs // parts // a.tiles
    real = int((a.row_ptr[a.slot : a.slot + a.tiles * a.BLOCK_N] >= 0).sum()) * images
    sizes = a.BLOCK_Y, a.BLOCK_K, a.BLOCK_C, a.BLOCK_O
    wide, steps, columns, outs = (blocks(a.PADDED, size) for size in sizes)
    queries = 1 if steps == 1 else wide  # how often a tile's own rows are read
    a.reads("x_ptr", real * a.S, real * a.S * (queries + parts + outs * parts), a.slot)
    for name in ("ask_ptr", "value_ptr"):
        a.reads(name, a.S**2, programs * a.S**2)
    for name in ("shift_ptr", "bias_ptr"):
        a.reads(name, a.S, programs * a.S)
    a.writes("y_ptr", real * a.S, a.slot)
    which = kind(a.x_ptr.dtype, a.PRECISION)
    a.count.dots(programs * wide * steps, a.BLOCK_Q, a.BLOCK_Y, a.BLOCK_K, which)
    a.count.dots(programs * wide, a.BLOCK_Q, a.BLOCK_N, a.BLOCK_Y, which)
    a.count.dots(programs * columns * outs, a.BLOCK_Q, a.BLOCK_N, a.BLOCK_C, which)
    a.count.dots(programs * columns * outs, a.BLOCK_Q, a.BLOCK_O, a.BLOCK_C, which)
    half = _half(a.x_ptr)
    a.count.vector = programs * a.BLOCK_Q * (a.PADDED * (3 + outs + (2 + outs) * half) + a.BLOCK_N * (6 + half))


def _captions(a: Any) -> tuple[int, int, int]:
    """Images, captions, and nodes of all images that a launch over images and groups of captions goes through."""
    captions = a.last - a.first
    images = a.count.programs // a.groups
    return images, captions, images * int(a.start_ptr[a.last] - a.start_ptr[a.first])


def _read(a: Any) -> None:
    images, captions, nodes = _captions(a)
    pairs = images * captions * a.S
    a.reads("asked_ptr", pairs, pairs)
    a.reads("x_ptr", nodes * a.S, nodes * a.S)
    a.writes("z_ptr", pairs)
    chunks = blocks(a.start_ptr[a.first : a.last + 1].diff().long(), a.BLOCK_R).sum()
    a.count.vector = a.PADDED * images * int(chunks) * (a.BLOCK_R * (4 + _half(a.x_ptr)) + 2)


def _dense(a: Any) -> None:
    outs, steps, programs = blocks(a.PADDED, a.BLOCK_O), blocks(a.PADDED, a.BLOCK_K), a.count.programs
    part = (a.first,) if a.FIRST_NODES else ()
    a.reads("x_ptr", a.pairs * a.S, outs * a.pairs * a.S, *part)
    a.reads("weight_ptr", a.S**2, programs * a.S**2)
    a.reads("bias_ptr", a.S, programs * a.S)
    if a.SCORE:
        a.reads("score_weight_ptr", a.S, programs * a.S)
        a.reads("score_bias_ptr", 1, programs)
    a.writes("y_ptr", a.pairs if a.SCORE else a.pairs * a.S)
    a.count.dots(programs * outs * steps, a.BLOCK_P, a.BLOCK_O, a.BLOCK_K, kind(a.x_ptr.dtype, a.PRECISION))
    last = 2 if a.SCORE else _half(a.y_ptr)
    a.count.vector = programs * a.BLOCK_P * a.PADDED * (1 + int(a.RELU) + last)


def _filter(a: Any) -> None:
    images, captions, nodes = _captions(a)
    pairs = images * captions
    a.reads("x_ptr", nodes * a.S, nodes * a.S)
    a.reads("weight_ptr", a.S, a.count.programs * a.S)
    for name in ("bias_ptr", "norm_weight_ptr", "norm_bias_ptr", "mean_ptr", "var_ptr"):
        a.reads(name, 1, pairs)
    if a.SCORE:
        a.reads("score_weight_ptr", a.S, pairs * a.S)
        a.reads("score_bias_ptr", 1, pairs)
    a.writes("y_ptr", pairs if a.SCORE else pairs * a.S)
    chunks = blocks(a.start_ptr[a.first : a.last + 1].diff().long(), a.BLOCK_R).sum()
    a.count.vector = a.PADDED * images * (int(chunks) * (a.BLOCK_R * (4 + _half(a.x_ptr)) + 1) + captions * 6)


COUNTS: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (
        _affinity, _gram, _lengths, _query_norms, _attend, _pool, _project, _step, _read, _dense, _filter,
    )
}  # fmt: skip


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
def recording(arch: int, run: Callable[..., Any] | None = None) -> Iterator[list[tuple[str, Count]]]:
    """Count the launches inside the `with` in place of running them, or with `run(kernel, grid, args, constants)`.

    Raises:
        KeyError: a kernel has no function in `COUNTS`.
    """
    found: list[tuple[str, Count]] = []
    memory = Memory()

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            one = Launch(memory, kernel.arg_names, grid, args, constants)
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
