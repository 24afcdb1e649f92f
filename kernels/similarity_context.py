"""`similarity_context` in Triton: equations in `ops/similarity_context.py`.

    X^l = A^l^T X^{l-1}, (1); the first level also copies global and local nodes to the result  `_level`
    d Z and d X^{l-1}, (3) and the first sum of (4); d W_l = d Z^T X^{l-1} is torch's           `_level_back`

Both read the nodes X^{l-1} in blocks of BLOCK_R rows, so captions may have any length, and S in steps of BLOCK_S
columns. A level's context nodes are padded to a power of two, at least 16, for tl.dot. COCO's captions have 13.3 words
with <start> and <end>, 91 % of them at most 16, so they fill 76 % of blocks of 16 rows and 41 % of blocks of 32. The
products still take less time than reading the nodes.

Backward takes blocks of images x captions, and computes the context nodes of all levels but the last again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from itm_fast._workspace import scratch_bytes
from itm_fast.packing import bounds, checked, spans, stretches

from . import _launch, _tiles
from ._tl import NEVER

OP = "similarity_context"


@triton.jit
def _rows(ptr, row, rows, cols, S: tl.constexpr):
    """Load columns `cols` of rows `row` of a matrix [rows, S]; 0 outside it."""
    return tl.load(ptr + row[:, None] * S + cols[None, :], mask=(row < rows)[:, None] & (cols < S)[None, :], other=0.0)


@triton.jit
def _logits(
    x_ptr, row, size, weight_ptr, context, contexts,
    S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """X W^T [BLOCK_R, BLOCK_C] of rows `row` of a caption's nodes, of which there are `size`; -inf beyond these."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for s in range(0, PADDED, BLOCK_S):
        cols = s + tl.arange(0, BLOCK_S)
        w = _rows(weight_ptr, context, contexts, cols, S)
        total = tl.dot(_rows(x_ptr, row, size, cols, S), tl.trans(w), total, input_precision=PRECISION)
    return tl.where((row < size)[:, None], total, NEVER)


@triton.jit(
    do_not_specialize=[
        "groups", "first", "last", "captions", "weight_first", "contexts", "x_first", "x_rows", "x_offset", "y_rows",
        "y_offset",
    ]
)  # fmt: skip
def _level(
    x_ptr, x_begin_ptr, size_ptr, weight_ptr, overall_ptr, y_ptr, y_begin_ptr,
    groups, first, last, captions, weight_first, contexts, x_first, x_rows, x_offset, y_rows, y_offset,
    S: tl.constexpr, CAPTIONS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    PADDED: tl.constexpr, COPY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(1): write a level's context nodes y from the nodes x of the level below; COPY: also the global and local nodes.

    x, y: as `Nodes` describes. `size_ptr` [T]: nodes of each caption in x. `weight_ptr` [C, S]: the assignment, from
    row weight_first on; `overall_ptr` [I, T, S]. One program: an image with CAPTIONS captions. Grid: images x groups.
    """
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    r, context = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    dtype = x_ptr.dtype.element_ty
    weight = weight_ptr + weight_first * S
    begin = first + group * CAPTIONS
    for t in range(begin, tl.minimum(begin + CAPTIONS, last)):
        size = tl.load(size_ptr + t)
        x = x_ptr + ((x_first + image) * x_rows + tl.load(x_begin_ptr + t) + x_offset) * S
        y_row = image * y_rows + tl.load(y_begin_ptr + t) + y_offset
        y = y_ptr + y_row * S
        logits = _logits(
            x, r, size, weight, context, contexts, S, BLOCK_R, BLOCK_C, BLOCK_S, PADDED, PRECISION
        )  # fmt: skip
        top = tl.max(logits, 0)
        total = tl.sum(tl.exp(logits - top[None, :]), 0)
        for at in range(BLOCK_R, size, BLOCK_R):
            more = _logits(
                x, at + r, size, weight, context, contexts, S, BLOCK_R, BLOCK_C, BLOCK_S, PADDED, PRECISION
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(more, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(more - higher[None, :]), 0)
            top = higher
        shares = tl.exp(logits - top[None, :]) / total[None, :]
        for s in range(0, PADDED, BLOCK_S):
            cols = s + tl.arange(0, BLOCK_S)
            part = _rows(x, r, size, cols, S)
            if COPY:
                # A caption's rows of the result: its global node, its local nodes, then these context nodes.
                inside = (r < size)[:, None] & (cols < S)[None, :]
                tl.store(y + (r - size)[:, None] * S + cols[None, :], part, mask=inside)
                node = tl.load(overall_ptr + (image * captions + t) * S + cols, mask=cols < S, other=0.0)
                tl.store(y - (size + 1) * S + cols, node, mask=cols < S)
            z = tl.dot(tl.trans(shares.to(dtype)), part, input_precision=PRECISION)
            for at in range(BLOCK_R, size, BLOCK_R):
                more = _logits(
                    x, at + r, size, weight, context, contexts, S, BLOCK_R, BLOCK_C, BLOCK_S, PADDED, PRECISION
                )  # fmt: skip
                others = tl.exp(more - top[None, :]) / total[None, :]
                part = _rows(x, at + r, size, cols, S)
                if COPY:
                    inside = (at + r < size)[:, None] & (cols < S)[None, :]
                    tl.store(y + (at + r - size)[:, None] * S + cols[None, :], part, mask=inside)
                z = tl.dot(tl.trans(others.to(dtype)), part, z, input_precision=PRECISION)
            inside = (context < contexts)[:, None] & (cols < S)[None, :]
            tl.store(y + context[:, None] * S + cols[None, :], z.to(dtype), mask=inside)


@triton.jit
def _logits_and_gradient(
    x_ptr, d_ptr, row, size, weight_ptr, context, contexts,
    S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits, as by `_logits`, and d A [BLOCK_R, BLOCK_C], from d X^l at `d_ptr`."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    d_shares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for s in range(0, PADDED, BLOCK_S):
        cols = s + tl.arange(0, BLOCK_S)
        x = _rows(x_ptr, row, size, cols, S)
        w = _rows(weight_ptr, context, contexts, cols, S)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        d = _rows(d_ptr, context, contexts, cols, S)
        d_shares = tl.dot(x, tl.trans(d), d_shares, input_precision=PRECISION)
    return tl.where((row < size)[:, None], total, NEVER), d_shares


@triton.jit
def _node_gradients(
    logits, d_shares, top, total, mean, row, size, context, contexts, weight_ptr, d_ptr, g_ptr, dx_ptr, dz_ptr,
    S: tl.constexpr, BLOCK_S: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store d Z, (3), and d X^{l-1}, (4), of rows `row` of a caption's nodes."""
    dtype = dx_ptr.dtype.element_ty
    shares = tl.exp(logits - top[None, :]) / total[None, :]
    d_logits = (shares * (d_shares - mean[None, :])).to(dtype)
    shares = shares.to(dtype)
    at = dz_ptr + row[:, None] * contexts + context[None, :]
    tl.store(at, d_logits, mask=(row < size)[:, None] & (context < contexts)[None, :])
    for s in range(0, PADDED, BLOCK_S):
        cols = s + tl.arange(0, BLOCK_S)
        dx = _rows(g_ptr, row, size, cols, S).to(tl.float32)
        dx = tl.dot(shares, _rows(d_ptr, context, contexts, cols, S), dx, input_precision=PRECISION)
        dx = tl.dot(d_logits, _rows(weight_ptr, context, contexts, cols, S), dx, input_precision=PRECISION)
        inside = (row < size)[:, None] & (cols < S)[None, :]
        tl.store(dx_ptr + row[:, None] * S + cols[None, :], dx.to(dtype), mask=inside)


@triton.jit(
    do_not_specialize=[
        "groups", "first", "last", "weight_first", "contexts", "x_first", "x_rows", "x_offset", "d_first", "d_rows",
        "d_offset", "g_first", "g_rows", "g_offset", "z_rows", "z_offset",
    ]
)  # fmt: skip
def _level_back(
    x_ptr, x_begin_ptr, size_ptr, weight_ptr, d_ptr, d_begin_ptr, g_ptr, g_begin_ptr, dx_ptr, dz_ptr,
    groups, first, last, weight_first, contexts, x_first, x_rows, x_offset, d_first, d_rows, d_offset,
    g_first, g_rows, g_offset, z_rows, z_offset,
    S: tl.constexpr, CAPTIONS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d X^{l-1} (`dx_ptr`, laid out like x) and d Z [images, z_rows, contexts], from d X^l (`d_ptr`).

    `g_ptr`: what the result's own gradient adds to d X^{l-1}. x, d, g: as `Nodes` describes.
    One program: an image with CAPTIONS captions. Grid: images x groups.
    """
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    r, context = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    weight = weight_ptr + weight_first * S
    begin = first + group * CAPTIONS
    for t in range(begin, tl.minimum(begin + CAPTIONS, last)):
        size, x_begin = tl.load(size_ptr + t), tl.load(x_begin_ptr + t)
        x_row = (x_first + image) * x_rows + x_begin + x_offset
        x, dx = x_ptr + x_row * S, dx_ptr + x_row * S
        d = d_ptr + ((d_first + image) * d_rows + tl.load(d_begin_ptr + t) + d_offset) * S
        g = g_ptr + ((g_first + image) * g_rows + tl.load(g_begin_ptr + t) + g_offset) * S
        dz = dz_ptr + (image * z_rows + x_begin + z_offset) * contexts
        logits, d_shares = _logits_and_gradient(
            x, d, r, size, weight, context, contexts, S, BLOCK_R, BLOCK_C, BLOCK_S, PADDED, PRECISION
        )  # fmt: skip
        top = tl.max(logits, 0)
        weights = tl.exp(logits - top[None, :])
        total = tl.sum(weights, 0)
        mean = tl.sum(weights * d_shares, 0)  # sum over the nodes of A d A, for (3)
        for at in range(BLOCK_R, size, BLOCK_R):
            more, d_more = _logits_and_gradient(
                x, d, at + r, size, weight, context, contexts, S, BLOCK_R, BLOCK_C, BLOCK_S, PADDED, PRECISION
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(more, 0))
            shrunk = tl.exp(top - higher)
            weights = tl.exp(more - higher[None, :])
            total = total * shrunk + tl.sum(weights, 0)
            mean = mean * shrunk + tl.sum(weights * d_more, 0)
            top = higher
        mean = mean / total
        _node_gradients(
            logits, d_shares, top, total, mean, r, size, context, contexts, weight, d, g, dx, dz,
            S, BLOCK_S, PADDED, PRECISION,
        )  # fmt: skip
        for at in range(BLOCK_R, size, BLOCK_R):
            more, d_more = _logits_and_gradient(
                x, d, at + r, size, weight, context, contexts, S, BLOCK_R, BLOCK_C, BLOCK_S, PADDED, PRECISION
            )  # fmt: skip
            _node_gradients(
                more, d_more, top, total, mean, at + r, size, context, contexts, weight, d, g, dx, dz,
                S, BLOCK_S, PADDED, PRECISION,
            )  # fmt: skip


class Nodes(NamedTuple):
    """Where nodes of S values lie: node j of caption t, image i is row `(first + i) * rows + begin[t] + offset + j`."""

    data: Tensor
    begin: Tensor  # [T] int32
    first: int
    rows: int
    offset: int


class Levels:
    """The levels of one call, and the layout of its result.

    Attributes:
        first: per level, its first row of the assignment.
        start: [T + 1] int32, where captions' local nodes begin.
        size: per level, [T] int32: how many nodes each caption has in the level below.
        overall, local, contexts: [T] int32, the result's row of a caption's global, first local, first context node.
    """

    def __init__(self, local: Tensor, assignment: Tensor, cu_seqlens: Tensor, sizes: list[int]) -> None:
        self.assignment, self.sizes, self.S = _launch.aligned(assignment), sizes, local.shape[2]
        self.first = [sum(sizes[:k]) for k in range(len(sizes))]
        self.start = _launch.aligned(checked(cu_seqlens).to(torch.int32))
        self.index = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=local.device)
        self.size = [self.start.diff(), *(torch.full_like(self.index, n) for n in sizes[:-1])]
        self.overall = self.start[:-1] + self.index * (1 + len(assignment))
        self.local = self.overall + 1
        self.contexts = self.local + self.size[0]

    def in_result(self, data: Tensor, first: int, level: int) -> Nodes:
        """A level's context nodes inside the result."""
        return Nodes(data, self.contexts, first, data.shape[1], self.first[level])

    def buffer(self, images: int, captions: slice, level: int) -> Nodes:
        """A new buffer for the context nodes of a level and a block."""
        n = self.sizes[level]
        rows = n * (captions.stop - captions.start)
        data = self.assignment.new_empty(images, rows, self.S)
        return Nodes(data, self.index * n, 0, rows, -n * captions.start)

    def tile(self, kernel, level: int) -> dict:
        dtype, padded = self.assignment.dtype, _launch.power_of_two(self.S)
        precision = _tiles.products(dtype)
        tile = kernel(dtype, _launch.arch(self.start.device), precision)
        return tile | dict(
            S=self.S, PADDED=padded, BLOCK_S=min(tile["BLOCK_S"], padded), PRECISION=precision,
            BLOCK_C=_launch.power_of_two(self.sizes[level]),
        )  # fmt: skip

    def make(
        self, level: int, x: Nodes, y: Nodes, images: int, captions: slice, overall: Tensor | None = None
    ) -> None:
        """Write a level's context nodes y from the nodes x; given `overall`, also copy the global nodes and x."""
        tile = self.tile(_tiles.context, level)
        groups = _launch.blocks(captions.stop - captions.start, tile["CAPTIONS"])
        _level[(images * groups,)](
            x.data, x.begin, self.size[level], self.assignment, x.data if overall is None else overall,
            y.data, y.begin, groups, captions.start, captions.stop, len(self.index), self.first[level],
            self.sizes[level], x.first, x.rows, x.offset, y.rows, y.offset, COPY=overall is not None, **tile,
        )  # fmt: skip

    def back(
        self, level: int, x: Nodes, d: Nodes, grad: Nodes, dx: Tensor, z_rows: int, z_offset: int, images: int,
        captions: slice,
    ) -> Tensor:  # fmt: skip
        """Write d X^{l-1}, which includes `grad`, into dx (laid out like x); return d Z [images, z_rows, contexts]."""
        tile = self.tile(_tiles.context_back, level)
        groups = _launch.blocks(captions.stop - captions.start, tile["CAPTIONS"])
        dz = dx.new_empty(images, z_rows, self.sizes[level])
        _level_back[(images * groups,)](
            x.data, x.begin, self.size[level], self.assignment, d.data, d.begin, grad.data, grad.begin, dx, dz,
            groups, captions.start, captions.stop, self.first[level], self.sizes[level], *x[2:], *d[2:], *grad[2:],
            z_rows, z_offset, **tile,
        )  # fmt: skip
        return dz


def forward(overall: Tensor, local: Tensor, assignment: Tensor, cu_seqlens: Tensor, sizes: list[int]) -> Tensor:
    (I, N, S), T = local.shape, len(cu_seqlens) - 1
    bounds(cu_seqlens, N, OP)
    result = local.new_empty(I, N + T * (1 + len(assignment)), S)
    if result.numel():
        with _launch.on(local.device):
            levels = Levels(local, assignment, cu_seqlens, sizes)
            x = Nodes(_launch.aligned(local), levels.start, 0, N, 0)
            copied: Tensor | None = _launch.aligned(overall)
            for level in range(len(sizes)):
                y = levels.in_result(result, 0, level)
                levels.make(level, x, y, I, slice(0, T), copied)
                x, copied = y, None
    return result


def backward(
    grad: Tensor, needs: list[bool], overall: Tensor, local: Tensor, assignment: Tensor, cu_seqlens: Tensor,
    sizes: list[int],
) -> list[Tensor]:  # fmt: skip
    I, N, S = local.shape
    edge = bounds(cu_seqlens, N, OP)
    d_local, d_assignment = torch.empty_like(local), torch.zeros_like(assignment, dtype=torch.float32)
    with _launch.on(local.device):
        levels = Levels(local, assignment, cu_seqlens, sizes)
        local, grad = _launch.aligned(local), _launch.aligned(grad)
        for images, captions in _blocks(edge, I, S, sizes, local):
            _block(levels, local, grad, d_local, d_assignment, images, captions, edge)
        d_overall = grad.index_select(1, levels.overall) if needs[0] else None
    return [d for d, n in zip((d_overall, d_local, d_assignment), needs) if n and d is not None]


def _blocks(edge: list[int], I: int, S: int, sizes: list[int], local: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of images and captions that fit the scratch memory: per caption, the context nodes of all levels but the
    last, their gradients, and d Z of every level. Only d Z of the first level grows with the caption's length."""
    limit, item = scratch_bytes(local.device), local.element_size()
    each = item * (2 * S * sum(sizes[:-1]) + sum(a * b for a, b in zip(sizes, sizes[1:])))
    taken = [each * t + item * sizes[0] * e for t, e in enumerate(edge)]
    products = item * S * max(sizes)  # d Z^T X of an image
    for captions in stretches(taken, limit):
        size = max(1, limit // (taken[captions.stop] - taken[captions.start] + products))
        for images in spans(I, size):
            yield images, captions


def _block(
    levels: Levels, local: Tensor, grad: Tensor, d_local: Tensor, d_assignment: Tensor, images: slice, captions: slice,
    edge: list[int],
) -> None:  # fmt: skip
    count, first, last = images.stop - images.start, edge[captions.start], edge[captions.stop]
    nodes = [Nodes(local, levels.start, images.start, local.shape[1], 0)]
    for level in range(len(levels.sizes) - 1):
        y = levels.buffer(count, captions, level)
        levels.make(level, nodes[-1], y, count, captions)
        nodes.append(y)
    d = levels.in_result(grad, images.start, len(levels.sizes) - 1)
    for level in reversed(range(len(levels.sizes))):
        x = nodes[level]
        if level:
            given, rows, offset = levels.in_result(grad, images.start, level - 1), x.rows, x.offset
            dx, part = torch.empty_like(x.data), x.data
        else:
            given = Nodes(grad, levels.local, images.start, grad.shape[1], 0)
            rows, offset, dx, part = last - first, -first, d_local, local[images, first:last]
        dz = levels.back(level, x, d, given, dx, rows, offset, count, captions)
        rows_of = slice(levels.first[level], levels.first[level] + levels.sizes[level])
        d_assignment[rows_of] += torch.bmm(dz.transpose(1, 2), part).sum(0, dtype=torch.float32)
        d = x._replace(data=dx)


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for dtype, t in _tiles.NAMES.items():
        for precision in _tiles.precisions(dtype):
            shape = dict(S=256, PADDED=256, BLOCK_C=16, PRECISION=precision)
            types = f"*{t} *i32 *i32 *{t} *{t} *{t} *i32" + " i32" * 11
            for copy in (True, False):
                yield _tiles.Compilation(_level, types, shape | dict(COPY=copy), _tiles.context(dtype, arch, precision))
            types = f"*{t} *i32 *i32 *{t} *{t} *i32 *{t} *i32 *{t} *{t}" + " i32" * 16
            yield _tiles.Compilation(_level_back, types, shape, _tiles.context_back(dtype, arch, precision))
