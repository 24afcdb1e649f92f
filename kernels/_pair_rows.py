"""Products with rows u that each query has with each set of contexts: attended vectors, their gradients, own queries.

    F[q, x]    = x . u[q, b]                                                                    `_context_products`
    sums[x]   += sum_q alpha[q, x] w1[q, b] u[q, b]                                             `_weighted_sum`
    u[q, b]    = inverse[q, b] sum_x alpha[q, x] x                                              `_combine`

Rows u are a workspace of the piece, [queries, sets, D], or lie in a tensor of all pairs: see `PairRows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._tl import EPS, rows_of

if TYPE_CHECKING:
    from ._attention import Attended


@triton.jit
def _plus_rows(u, alphas, context, size, x, column, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """u plus the share of context rows `x` in alpha x."""
    a = tl.load(alphas + x[None, :], mask=(x < size)[None, :], other=0.0).to(context.dtype.element_ty)
    v = rows_of(context, tl.minimum(x, size - 1), column, D, BLOCK_K)
    return tl.dot(a, v, u, input_precision=PRECISION)


@triton.jit
def attended_columns(
    alphas, alpha, context, size, x, column, D: tl.constexpr, WHOLE: tl.constexpr, GLOBAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """alpha x [BLOCK_Q, BLOCK_K], for BLOCK_K columns of D; GLOBAL: the one context row, for all queries."""
    if GLOBAL:
        v = tl.load(context + column, mask=column < D, other=0.0).to(tl.float32)
        return tl.broadcast_to(v[None, :], (BLOCK_Q, BLOCK_K))
    elif WHOLE and BLOCK_X == ROWS:
        # Rows past the set load its last row, whose weight is 0 there.
        v = rows_of(context, tl.minimum(x, size - 1), column, D, BLOCK_K)
        return tl.dot(alpha, v, input_precision=PRECISION)
    else:
        u = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        if WHOLE:  # unrolled: only a loop without a loop inside is pipelined, here that over D
            for j in tl.static_range(0, ROWS, BLOCK_X):
                u = _plus_rows(u, alphas, context, size, j + x, column, D, PRECISION, BLOCK_K)
        else:
            for j in range(0, size, BLOCK_X):
                u = _plus_rows(u, alphas, context, size, j + x, column, D, PRECISION, BLOCK_K)
        return u


@triton.jit(do_not_specialize=["set_first", "sets", "context_first", "query_first", "queries", "part", "ld16", "in16"])
def _context_products(
    alpha_ptr, square_ptr, row_ptr, place_ptr, context_ptr, start_ptr, size_ptr, f_ptr, w0_ptr, w1_ptr, w2_ptr,
    set_first, sets, context_first, query_first, queries, part, ld16, in16,
    D: tl.constexpr, SUMS: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """F = x . u [queries, context rows], laid out like alpha, from the rows u.

    SUMS "weighted": w0 [queries, sets] = sum_x alpha_x F_x. "unit": w0, w1 and w2 of `_projection_backward`, for which
    `square_ptr` has |P|^2. PLACED: query q's row with set b is place[q] + b * part, else q * sets + b of the piece.
    One program: BLOCK_Q queries with one set of contexts. Grid: blocks of queries x sets.
    """
    tile, b = tl.program_id(0) // sets, tl.program_id(0) % sets
    first = tile * BLOCK_Q
    q = tl.minimum(tl.arange(0, BLOCK_Q), queries - first - 1)
    real = tl.arange(0, BLOCK_Q) < queries - first
    start = tl.load(start_ptr + set_first + b)
    size = tl.load(size_ptr + set_first + b)
    context = context_ptr + start.to(tl.int64) * D
    if PLACED:
        rows = row_ptr + (set_first + b).to(tl.int64) * part * D
        line = tl.load(place_ptr + query_first + first + q)
    else:
        rows = row_ptr + (first.to(tl.int64) * sets + b) * D
        line = q * sets
    corner = first.to(tl.int64) * (ld16 * 16) + start - context_first
    along = tl.zeros((BLOCK_Q,), tl.float32)
    for j in range(0, size, BLOCK_X):
        x = j + tl.arange(0, BLOCK_X)
        f = tl.zeros((BLOCK_Q, BLOCK_X), tl.float32)
        for step in range(0, D, BLOCK_K):
            column = step + tl.arange(0, BLOCK_K)
            left = rows_of(rows, line, column, D, BLOCK_K)
            v = rows_of(context, tl.minimum(x, size - 1), column, D, BLOCK_K).to(row_ptr.dtype.element_ty)
            f = tl.dot(left, v.T, f, input_precision=PRECISION)
        at = corner + q[:, None] * (ld16 * 16) + x[None, :]
        if SUMS != "none":
            alpha = tl.load(alpha_ptr + at, mask=(x < size)[None, :], other=0.0)
            along += tl.sum(alpha * f, 1)
        tl.store(f_ptr + at, f, mask=real[:, None] & (x < size)[None, :])
    at_b = first.to(tl.int64) * (in16 * 16) + b + q * (in16 * 16)
    if SUMS == "weighted":
        tl.store(w0_ptr + at_b, along, mask=real)
    elif SUMS == "unit":
        p = tl.sqrt(tl.load(square_ptr + at_b))
        w1 = 1 / (p + EPS)
        k = along * w1
        tl.store(w0_ptr + at_b, k * EPS * w1, mask=real)
        tl.store(w1_ptr + at_b, w1, mask=real)
        tl.store(w2_ptr + at_b, tl.where(p > 0, -k * w1 / tl.where(p > 0, p, 1.0), 0.0), mask=real)


@triton.jit(
    do_not_specialize=[
        "set_first", "sets", "context_first", "query_first", "queries", "part", "chunks", "ld16", "in16",
    ]
)
def _weighted_sum(
    alpha_ptr, w1_ptr, row_ptr, place_ptr, start_ptr, size_ptr, out_ptr,
    set_first, sets, context_first, query_first, queries, part, chunks, ld16, in16,
    D: tl.constexpr, SCALED: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [all context rows, D] += sum_q alpha_x w1 u, from the rows u; w1 is 1 unless SCALED. PLACED: as above.

    One program: BLOCK_X rows and BLOCK_K columns of one set. Grid: sets x chunks of rows x chunks of columns.
    """
    columns: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    b, i, d = pid // (chunks * columns), (pid // columns) % chunks, pid % columns
    start = tl.load(start_ptr + set_first + b)
    size = tl.load(size_ptr + set_first + b)
    if i * BLOCK_X < size:
        x, k = i * BLOCK_X + tl.arange(0, BLOCK_X), d * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_X, BLOCK_K), tl.float32)
        for first in range(0, queries, BLOCK_Q):
            q = (first + tl.arange(0, BLOCK_Q)).to(tl.int64)
            real = q < queries
            alphas = alpha_ptr + start - context_first + q[:, None] * (ld16 * 16) + x[None, :]
            alpha = tl.load(alphas, mask=real[:, None] & (x < size)[None, :], other=0.0)
            if SCALED:
                alpha *= tl.load(w1_ptr + q * (in16 * 16) + b, mask=real, other=0.0)[:, None]
            line = q * sets + b
            if PLACED:
                line = tl.load(place_ptr + query_first + q, mask=real, other=0) + (set_first + b).to(tl.int64) * part
            inside = real[:, None] & (k < D)[None, :]
            u = tl.load(row_ptr + line[:, None] * D + k[None, :], mask=inside, other=0.0).to(tl.float32)
            acc = tl.dot(alpha.T, u, acc, input_precision=PRECISION)
        out = out_ptr + (start + x).to(tl.int64)[:, None] * D + k[None, :]
        inside = (x < size)[:, None] & (k < D)[None, :]
        tl.store(out, tl.load(out, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit(do_not_specialize=["set_first", "sets", "context_first", "query_first", "queries", "part", "ld16", "in16"])
def _combine(
    alpha_ptr, inverse_ptr, context_ptr, place_ptr, start_ptr, size_ptr, query_start_ptr, query_size_ptr, owner_ptr,
    out_ptr, set_first, sets, context_first, query_first, queries, part, ld16, in16,
    D: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row place[q] + b * part of out = inverse sum_x alpha_x x; inverse is 1 unless SCALED. Padding regions give zeros.

    `alpha_ptr` [queries, context rows], `inverse_ptr` [queries, sets].
    One program: BLOCK_Q queries with one set of contexts. Grid: blocks of queries x sets.
    """
    tile, b = tl.program_id(0) // sets, tl.program_id(0) % sets
    first = tile * BLOCK_Q
    q = tl.minimum(tl.arange(0, BLOCK_Q), queries - first - 1)
    real = tl.arange(0, BLOCK_Q) < queries - first
    start = tl.load(start_ptr + set_first + b)
    size = tl.load(size_ptr + set_first + b)
    context = context_ptr + start.to(tl.int64) * D
    alphas = alpha_ptr + first.to(tl.int64) * (ld16 * 16) + start - context_first + q[:, None] * (ld16 * 16)
    x = tl.arange(0, BLOCK_X)
    alpha = 0.0
    if WHOLE:
        alpha = tl.load(alphas + x[None, :], mask=(x < size)[None, :], other=0.0).to(context_ptr.dtype.element_ty)
    row = query_first + first + q
    owner = tl.load(owner_ptr + row)
    counted = row - tl.load(query_start_ptr + owner) < tl.load(query_size_ptr + owner)
    out = out_ptr + (tl.load(place_ptr + row) + (set_first + b).to(tl.int64) * part)[:, None] * D
    for step in range(0, D, BLOCK_K):
        column = step + tl.arange(0, BLOCK_K)
        u = attended_columns(
            alphas, alpha, context, size, x, column, D, WHOLE, False, PRECISION, BLOCK_Q, BLOCK_X, BLOCK_K, BLOCK_X
        )
        if SCALED:
            u *= tl.load(inverse_ptr + first.to(tl.int64) * (in16 * 16) + b + q * (in16 * 16))[:, None]
        u = tl.where(counted[:, None], u, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out + column[None, :], u, mask=real[:, None] & (column < D)[None, :])


class PairRows(NamedTuple):
    """Rows that each query has with each set of contexts, in a tensor of all pairs.

    Attributes:
        rows: contiguous and aligned; the last dimension is a row's.
        place: [all queries] int64; query q's row with set b is number place[q] + b * part.
        part: see `place`.
    """

    rows: Tensor
    place: Tensor
    part: int


def pair_rows(rows: Tensor, images: int, captions: int, regions: int, direction: str) -> PairRows:
    """Rows of words [I, N, ...] (t2i) or of regions [I, T, R, ...] (i2t), also with T * R as one dimension."""
    if direction == "t2i":
        return PairRows(rows, torch.arange(rows.shape[1], device=rows.device), rows.shape[1])
    image = torch.arange(images, device=rows.device)[:, None] * (captions * regions)
    return PairRows(rows, (image + torch.arange(regions, device=rows.device)).flatten(), regions)


def context_products(
    context: _launch.Sets,
    piece: _launch.Piece,
    u: Tensor | PairRows,
    f: Tensor,
    attended: Attended | None = None,
    w: tuple[Tensor, ...] = (),
) -> None:
    """Write F of a piece into f [queries, stride]; and with `attended` also w0, or w0, w1 and w2 if there is |P|^2.

    Args:
        context: the sets whose rows are multiplied with u.
        u: of the piece [queries, sets, D], or of all pairs.
    """
    placed = isinstance(u, PairRows)
    rows, place, part = u if isinstance(u, PairRows) else (u, context.owner, 0)
    queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
    dtype = context.rows.dtype
    precision = _tiles.products(dtype)
    tile = _tiles.context_products(dtype, _launch.arch(f.device), precision)
    alpha, square = (f, f) if attended is None else (attended.alpha, attended.out)
    w0, w1, w2 = (f, f, f) if attended is None else w if attended.gram else (w[0], f, f)
    sums = "none" if attended is None else "unit" if attended.gram else "weighted"
    _context_products[(_launch.blocks(queries, tile["BLOCK_Q"]) * sets,)](
        alpha, square, rows, place, context.rows, context.start, context.size, f, w0, w1, w2,
        piece.contexts.start, sets, piece.x.start, piece.q.start, queries, part,
        f.stride(0) // 16, square.stride(0) // 16, D=context.rows.shape[1], SUMS=sums, PLACED=placed,
        PRECISION=precision, BLOCK_X=context.tile, **tile,
    )  # fmt: skip


def weighted_sum(
    context: _launch.Sets, piece: _launch.Piece, alpha: Tensor, w1: Tensor | None, u: Tensor | PairRows, out: Tensor
) -> None:
    """Add sum_q alpha w1 u of a piece to out [all context rows, D]; w1 None is 1. `u`: as in `context_products`."""
    placed = isinstance(u, PairRows)
    rows, place, part = u if isinstance(u, PairRows) else (u, context.owner, 0)
    queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
    dtype, D = context.rows.dtype, out.shape[1]
    precision = _tiles.products(dtype)
    tile = _tiles.weighted_sum(dtype, _launch.arch(out.device), precision)
    chunks = _launch.blocks(context.longest, tile["BLOCK_X"])
    _weighted_sum[(sets * chunks * _launch.blocks(D, tile["BLOCK_K"]),)](
        alpha, alpha if w1 is None else w1, rows, place, context.start, context.size, out,
        piece.contexts.start, sets, piece.x.start, piece.q.start, queries, part, chunks, alpha.stride(0) // 16,
        0 if w1 is None else w1.stride(0) // 16, D=D, SCALED=w1 is not None, PLACED=placed, PRECISION=precision, **tile,
    )  # fmt: skip


def combine(
    query: _launch.Sets, context: _launch.Sets, piece: _launch.Piece, alpha: Tensor, inverse: Tensor | None,
    out: PairRows,
) -> None:  # fmt: skip
    """Write inverse sum_x alpha x of a piece into its rows of out; inverse None is 1, and x are the rows of context."""
    rows = context.rows
    queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
    precision = _tiles.products(rows.dtype)
    tile = _tiles.combine(rows.dtype, _launch.arch(rows.device), precision)
    _combine[(_launch.blocks(queries, tile["BLOCK_Q"]) * sets,)](
        alpha, alpha if inverse is None else inverse, rows, out.place, context.start, context.size,
        query.start, query.size, query.owner, out.rows, piece.contexts.start, sets, piece.x.start, piece.q.start,
        queries, out.part, alpha.stride(0) // 16, 0 if inverse is None else inverse.stride(0) // 16,
        D=rows.shape[1], SCALED=inverse is not None, WHOLE=context.whole, PRECISION=precision, BLOCK_X=context.tile,
        **tile,
    )  # fmt: skip


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    wide, narrow = _launch.REGIONS, _launch.WORDS
    for dtype, t in _tiles.NAMES.items():
        for precision in _tiles.precisions(dtype):
            # type of the rows u, SUMS, PLACED, rows of a tile of contexts
            ways = [("fp32", "unit", False, rows) for rows in (wide, narrow)]
            ways += [(t, how, True, rows) for how in ("none", "weighted") for rows in (wide, narrow)]
            for u, how, placed, rows in ways:
                place = "*i64" if placed else "*i32"
                types = f"*fp32 *fp32 *{u} {place} *{t} *i32 *i32" + " *fp32" * 4 + " i32" * 8
                constants = dict(D=1024, SUMS=how, PLACED=placed, PRECISION=precision, BLOCK_X=rows)
                tile = _tiles.context_products(dtype, arch, precision)
                yield _tiles.Compilation(_context_products, types, constants, tile)
            for u, placed in (("fp32", False), (t, True)):
                types = f"*fp32 *fp32 *{u} {'*i64' if placed else '*i32'} *i32 *i32 *fp32" + " i32" * 9
                constants = dict(D=1024, SCALED=not placed, PLACED=placed, PRECISION=precision)
                tile = _tiles.weighted_sum(dtype, arch, precision)
                yield _tiles.Compilation(_weighted_sum, types, constants, tile)
            for scaled, whole, rows in ((True, True, wide), (True, False, narrow), (False, True, wide)):
                types = f"*fp32 *fp32 *{t} *i64 *i32 *i32 *i32 *i32 *i32 *{t}" + " i32" * 8
                constants = dict(D=1024, SCALED=scaled, WHOLE=whole, PRECISION=precision, BLOCK_X=rows)
                yield _tiles.Compilation(_combine, types, constants, _tiles.combine(dtype, arch, precision))
