"""Products of feature rows: affinities, Gram matrices of sets, lengths.

    A[q, x] = row q of the queries . row x of the contexts                                      `affinity`
    G[x, x'] = row x . row x', both of one set                                                  `gram`
    |x|      = length of row x                                                                  `lengths`

Affinities multiply the packed rows of all sets densely. Sets of 36 regions or 12 words are not padded, so only tiles at
the end of the matrix do work that is thrown away. An element has the same bits wherever its rows lie in a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._tl import swizzled


@triton.jit(do_not_specialize=["query_first", "queries", "context_first", "contexts", "ld16"])
def _affinity(
    query_ptr, context_ptr, out_ptr, query_first, queries, context_first, contexts, ld16,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out [queries, stride] = query[query_first:] [queries, D] @ context[context_first:] [contexts, D]^T.

    One program: a tile [BLOCK_M queries, BLOCK_N contexts]. Grid: all tiles, in the order of `swizzled`.
    """
    m, n = swizzled(tl.program_id(0), tl.cdiv(queries, BLOCK_M), tl.cdiv(contexts, BLOCK_N), GROUP)
    row, col, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, cols = queries - m * BLOCK_M, contexts - n * BLOCK_N  # from this tile's corner to the end
    # Offsets within a tile fit 32 bits. Rows past the end load the last row instead and are not stored, so the loop
    # needs no row mask.
    query = query_ptr + (query_first + m * BLOCK_M).to(tl.int64) * D
    query += tl.minimum(row, rows - 1)[:, None] * D + k[None, :]
    context = context_ptr + (context_first + n * BLOCK_N).to(tl.int64) * D
    context += tl.minimum(col, cols - 1)[:, None] * D + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            a = tl.load(query)  # [BLOCK_M, BLOCK_K]
            b = tl.load(context)  # [BLOCK_N, BLOCK_K]
        else:
            a = tl.load(query, mask=(step + k < D)[None, :], other=0.0)
            b = tl.load(context, mask=(step + k < D)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        query += BLOCK_K
        context += BLOCK_K
    out = out_ptr + (m * BLOCK_M).to(tl.int64) * (ld16 * 16) + n * BLOCK_N
    tl.store(out + row[:, None] * (ld16 * 16) + col[None, :], acc, mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit(do_not_specialize=["set_first", "row_first", "ld16", "chunks"])
def _gram(
    row_ptr, start_ptr, count_ptr, out_ptr, set_first, row_first, ld16, chunks,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, stride]: row x of a set holds G[x, :], its products with all rows of the same set.

    One program: [BLOCK_X, BLOCK_X] of one set's G. Grid: sets x chunks x chunks, where `chunks` blocks cover the
    longest set. `row_first`: the first row of set `set_first`, which is row 0 of out.
    """
    pid = tl.program_id(0)
    set_ = set_first + pid // (chunks * chunks)
    i, j = (pid // chunks) % chunks, pid % chunks
    start = tl.load(start_ptr + set_).to(tl.int64)
    count = tl.load(count_ptr + set_)
    if (i * BLOCK_X < count) & (j * BLOCK_X < count):
        x = i * BLOCK_X + tl.arange(0, BLOCK_X)
        y = j * BLOCK_X + tl.arange(0, BLOCK_X)
        k = tl.arange(0, BLOCK_K)
        # Past the set's end lie another set's rows or padding: load the set's last row instead.
        left = row_ptr + (start + tl.minimum(x, count - 1))[:, None] * D + k[None, :]
        right = row_ptr + (start + tl.minimum(y, count - 1))[:, None] * D + k[None, :]
        acc = tl.zeros((BLOCK_X, BLOCK_X), tl.float32)
        for step in range(0, D, BLOCK_K):
            inside = (step + k < D)[None, :]
            a = tl.load(left, mask=inside, other=0.0)  # [BLOCK_X, BLOCK_K]
            b = tl.load(right, mask=inside, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            left += BLOCK_K
            right += BLOCK_K
        out = out_ptr + (start - row_first + x)[:, None] * (ld16 * 16) + y[None, :]
        tl.store(out, acc, mask=(x < count)[:, None] & (y < count)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _lengths(row_ptr, out_ptr, rows, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [rows] = |x| of rows [rows, D]. One program: BLOCK_M rows. Grid: blocks of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(0, D, BLOCK_K):
        inside = (row < rows)[:, None] & (step + k < D)[None, :]
        x = tl.load(row_ptr + row[:, None] * D + step + k[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += x * x
    tl.store(out_ptr + row, tl.sqrt(tl.sum(acc, 1)), mask=row < rows)


def leading(columns: int) -> int:
    """Row stride in floats of a workspace with `columns` columns: a multiple of 16, so that rows are aligned."""
    return 16 * _launch.blocks(columns, 16)


def affinity(query: Tensor, context: Tensor, q: slice, x: slice, out: Tensor, precision: str) -> None:
    """out [rows of q, leading(rows of x)] = query[q] @ context[x].T; padding columns are not written."""
    queries, contexts, D = q.stop - q.start, x.stop - x.start, query.shape[1]
    tile = _tiles.affinity(query.dtype, _launch.arch(query.device), precision)
    grid = (_launch.blocks(queries, tile["BLOCK_M"]) * _launch.blocks(contexts, tile["BLOCK_N"]),)
    _affinity[grid](
        query, context, out, q.start, queries, x.start, contexts, out.stride(0) // 16,
        D=D, PRECISION=precision, **tile,
    )  # fmt: skip


def gram(sets: _launch.Sets, first: int, last: int, out: Tensor) -> None:
    """Write the Gram matrices of sets first..last into out [rows of these sets, leading(longest)]."""
    rows = sets.rows
    tile = _tiles.gram(rows.dtype, _launch.arch(rows.device))
    chunks = _launch.blocks(sets.longest, tile["BLOCK_X"])
    _gram[((last - first) * chunks * chunks,)](
        rows, sets.start, sets.size, out, first, sets.edge[first], out.stride(0) // 16, chunks,
        D=rows.shape[1], PRECISION=_tiles.exact(rows.dtype), **tile,
    )  # fmt: skip


def lengths(rows: Tensor) -> Tensor:
    """|x| of rows [n, D] -> [n] float32."""
    out = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    if len(rows):
        tile = _tiles.lengths(rows.dtype, _launch.arch(rows.device))
        _lengths[(_launch.blocks(len(rows), tile["BLOCK_M"]),)](rows, out, len(rows), D=rows.shape[1], **tile)
    return out


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for dtype, t in _tiles.NAMES.items():
        for precision in _tiles.precisions(dtype):
            constants, tile = dict(D=1024, PRECISION=precision), _tiles.affinity(dtype, arch, precision)
            yield _tiles.Compilation(_affinity, f"*{t} *{t} *fp32 i32 i32 i32 i32 i32", constants, tile, products=True)
        constants = dict(D=1024, PRECISION=_tiles.exact(dtype))
        tile = _tiles.gram(dtype, arch)
        yield _tiles.Compilation(_gram, f"*{t} *i32 *i32 *fp32 i32 i32 i32 i32", constants, tile)
        yield _tiles.Compilation(_lengths, f"*{t} *fp32 i32", dict(D=1024), _tiles.lengths(dtype, arch))
