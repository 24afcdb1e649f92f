"""Pooling of the queries' cosines to scores, and its backward: (2), (4), (8) of `ops/cross_attention_score.py`.

    score[b, c] = pool over the queries q of set c of r[q, b]                                   `_pool`

A program takes 8 whole sets of queries, 16 queries of each at a time. It reads [queries, context sets], which is small
beside the affinities.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._attention import Attended
from ._attention_backward import coefficients
from ._tl import EPS, NEVER


@triton.jit(
    do_not_specialize=["set_first", "sets", "row_first", "columns", "in16", "stride_b", "stride_c"],
    do_not_specialize_on_alignment=["out_ptr"],  # points to the piece's first score, at any alignment
)
def _pool(
    r_ptr, start_ptr, size_ptr, out_ptr, set_first, sets, row_first, columns, in16, stride_b, stride_c, pool_scale,
    POOL: tl.constexpr, SETS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """out[b, c], by its strides, = pool over the queries q of set c of r [queries, columns context sets].

    One program: SETS sets of queries with BLOCK_B sets of contexts. Grid: groups of SETS x blocks of context sets.
    """
    chunks = tl.cdiv(columns, BLOCK_B)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane = tl.arange(0, SETS * BLOCK_Q)
    c = group * SETS + lane // BLOCK_Q
    start = tl.load(start_ptr + set_first + c, mask=c < sets, other=0) - row_first
    size = tl.load(size_ptr + set_first + c, mask=c < sets, other=0)
    b = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    m = tl.full((SETS, BLOCK_B), NEVER, tl.float32)
    total = tl.zeros((SETS, BLOCK_B), tl.float32)
    for first in range(0, tl.max(size, 0), BLOCK_Q):
        q = first + lane % BLOCK_Q
        inside = (q < size)[:, None] & (b < columns)[None, :]
        at = r_ptr + (start + q).to(tl.int64)[:, None] * (in16 * 16) + b[None, :]
        if POOL == "lse" or POOL == "max":
            r = tl.load(at, mask=inside, other=NEVER)
            if POOL == "lse":
                r = r * pool_scale
            largest = tl.max(r.reshape(SETS, BLOCK_Q, BLOCK_B), 1)
            larger = tl.maximum(m, largest)
            if POOL == "lse":
                base = tl.where(larger == NEVER, 0.0, larger)
                e = tl.exp(r.reshape(SETS, BLOCK_Q, BLOCK_B) - base[:, None, :])
                total = total * tl.exp(m - base) + tl.sum(e, 1)
            else:
                # tl.max drops NaN, so NaNs are summed apart and added at the end
                total += tl.sum(tl.where(r != r, r, 0.0).reshape(SETS, BLOCK_Q, BLOCK_B), 1)
            m = larger
        else:
            total += tl.sum(tl.load(at, mask=inside, other=0.0).reshape(SETS, BLOCK_Q, BLOCK_B), 1)
    c = group * SETS + tl.arange(0, SETS)
    if POOL == "lse":
        total = (m + tl.log(total)) / pool_scale
    elif POOL == "max":
        total = m + total
    elif POOL == "mean":
        size = tl.load(size_ptr + set_first + c, mask=c < sets, other=1)
        total = total / size.to(tl.float32)[:, None]
    out = out_ptr + b.to(tl.int64)[None, :] * stride_b + c.to(tl.int64)[:, None] * stride_c
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(c < sets)[:, None] & (b < columns)[None, :])


@triton.jit
def _cosine(dot_ptr, square_ptr, at, inside, length):
    """t, |P|^2, c = |q| |P| and r of a tile; r is -inf outside."""
    dot = tl.load(dot_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    c = length[:, None] * tl.sqrt(square)
    return dot, square, c, tl.where(inside, dot / tl.maximum(c, EPS), NEVER)


@triton.jit(
    do_not_specialize=["set_first", "sets", "row_first", "columns", "in16", "stride_b", "stride_c"],
    do_not_specialize_on_alignment=["grad_ptr"],  # points to the piece's first score, at any alignment
)
def _pool_backward(
    dot_ptr, square_ptr, length_ptr, start_ptr, size_ptr, grad_ptr, w0_ptr, w1_ptr, w2_ptr, wq_ptr,
    set_first, sets, row_first, columns, in16, stride_b, stride_c, pool_scale,
    POOL: tl.constexpr, SETS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """w0, w1, w2 (see `_attention_backward`) and wq, where d q += wq q, from the scores' gradient `grad_ptr`.

    `dot_ptr`, `square_ptr` (|P|^2) and the results: [queries, columns context sets]. `length_ptr`: |q| of all queries.
    One program: SETS sets of queries with BLOCK_B sets of contexts. Grid: groups of SETS x blocks of context sets.
    """
    chunks = tl.cdiv(columns, BLOCK_B)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane = tl.arange(0, SETS * BLOCK_Q)
    c_lane = group * SETS + lane // BLOCK_Q
    start = tl.load(start_ptr + set_first + c_lane, mask=c_lane < sets, other=0)
    size = tl.load(size_ptr + set_first + c_lane, mask=c_lane < sets, other=0)
    b = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    set_ = group * SETS + tl.arange(0, SETS)
    m = tl.full((SETS, BLOCK_B), NEVER, tl.float32)
    total = tl.zeros((SETS, BLOCK_B), tl.float32)
    best = tl.zeros((SETS, BLOCK_B), tl.int32)
    if POOL == "lse" or POOL == "max":
        for first in range(0, tl.max(size, 0), BLOCK_Q):
            q = first + lane % BLOCK_Q
            inside = (q < size)[:, None] & (b < columns)[None, :]
            length = tl.load(length_ptr + start + q, mask=q < size, other=0.0)
            at = (start - row_first + q).to(tl.int64)[:, None] * (in16 * 16) + b[None, :]
            _, _, _, r = _cosine(dot_ptr, square_ptr, at, inside, length)
            r = r.reshape(SETS, BLOCK_Q, BLOCK_B)
            if POOL == "lse":
                r = r * pool_scale
            largest = tl.max(r, 1)
            larger = tl.maximum(m, largest)
            if POOL == "lse":
                base = tl.where(larger == NEVER, 0.0, larger)
                total = total * tl.exp(m - base) + tl.sum(tl.exp(r - base[:, None, :]), 1)
            else:
                place = tl.where(r == largest[:, None, :], first + tl.arange(0, BLOCK_Q)[None, :, None], 1 << 30)
                best = tl.where(largest > m, tl.min(place, 1), best)
            m = larger
    grad = tl.load(
        grad_ptr + b.to(tl.int64)[None, :] * stride_b + set_.to(tl.int64)[:, None] * stride_c,
        mask=(set_ < sets)[:, None] & (b < columns)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    if POOL == "mean":
        count = tl.load(size_ptr + set_first + set_, mask=set_ < sets, other=1)
        grad = grad / count.to(tl.float32)[:, None]
    base = m + tl.log(total)
    for first in range(0, tl.max(size, 0), BLOCK_Q):
        q = first + lane % BLOCK_Q
        inside = (q < size)[:, None] & (b < columns)[None, :]
        length = tl.load(length_ptr + start + q, mask=q < size, other=0.0)
        at = (start - row_first + q).to(tl.int64)[:, None] * (in16 * 16) + b[None, :]
        dot, square, c, r = _cosine(dot_ptr, square_ptr, at, inside, length)
        d_r = tl.broadcast_to(grad[:, None, :], (SETS, BLOCK_Q, BLOCK_B))
        if POOL == "lse":
            d_r = d_r * tl.exp(pool_scale * r.reshape(SETS, BLOCK_Q, BLOCK_B) - base[:, None, :])
        elif POOL == "max":
            d_r = tl.where(first + tl.arange(0, BLOCK_Q)[None, :, None] == best[:, None, :], d_r, 0.0)
        d_r = d_r.reshape(SETS * BLOCK_Q, BLOCK_B)
        long = c >= EPS
        d_c = tl.where(long, -d_r * r / tl.where(long, c, 1.0), 0.0)
        p = tl.where(long, tl.sqrt(square), 1.0)
        w1 = d_r / tl.maximum(c, EPS)
        w2 = d_c * length[:, None] / p
        tl.store(w0_ptr + at, w1 * dot + w2 * square, mask=inside)
        tl.store(w1_ptr + at, w1, mask=inside)
        tl.store(w2_ptr + at, w2, mask=inside)
        tl.store(wq_ptr + at, tl.where(long, d_c * p / length[:, None], 0.0), mask=inside)


def pooled(r: Tensor, query: _launch.Sets, piece: _launch.Piece, out: Tensor, how: str, pool_scale: float) -> None:
    """Write the scores of a piece, pooled from r, into out: a view [context sets, query sets] of all scores."""
    tile = _tiles.pool(query.rows.dtype, _launch.arch(r.device))
    sets, columns = piece.queries.stop - piece.queries.start, piece.contexts.stop - piece.contexts.start
    part = out[piece.contexts, piece.queries]
    _pool[(_launch.blocks(sets, tile["SETS"]) * _launch.blocks(columns, tile["BLOCK_B"]),)](
        r, query.start, query.size, part, piece.queries.start, sets, piece.q.start, columns, r.stride(0) // 16,
        *part.stride(), pool_scale, POOL=how, **tile,
    )  # fmt: skip


def pool_backward(
    query: _launch.Sets, piece: _launch.Piece, attended: Attended, length: Tensor, grad: Tensor, how: str, scale: float
) -> tuple[Tensor, ...]:
    """w0, w1, w2 and wq of a piece from the gradient of all scores, a view [context sets, query sets]."""
    w = coefficients(attended.out, 4)
    tile = _tiles.pool_backward(query.rows.dtype, _launch.arch(grad.device))
    sets, columns = piece.queries.stop - piece.queries.start, piece.contexts.stop - piece.contexts.start
    part = grad[piece.contexts, piece.queries]
    _pool_backward[(_launch.blocks(sets, tile["SETS"]) * _launch.blocks(columns, tile["BLOCK_B"]),)](
        attended.dot, attended.out, length, query.start, query.size, part, *w, piece.queries.start, sets,
        piece.q.start, columns, attended.out.stride(0) // 16, *part.stride(), scale, POOL=how, **tile,
    )  # fmt: skip
    return w


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    single = torch.float32
    for how in ("lse", "max", "sum", "mean"):
        types = f"*fp32 *i32 *i32 *{'fp16' if how == 'lse' else 'fp32'} i32 i32 i32 i32 i32 i32 i32 fp32"
        yield _tiles.Compilation(_pool, types, dict(POOL=how), _tiles.pool(torch.float32, arch))
        grad = "*fp16" if how == "lse" else "*fp32"
        types = f"*fp32 *fp32 *fp32 *i32 *i32 {grad}" + " *fp32" * 4 + " i32" * 7 + " fp32"
        yield _tiles.Compilation(_pool_backward, types, dict(POOL=how), _tiles.pool_backward(single, arch))
