"""Pooling of the queries' similarities to scores, and its backward: (2), (4), (8) of `ops/cross_attention_score.py`.

    score[b, c] = pool over the queries q of set c of r[q, b]                                   `_pool`
    n[q, b]     = sum over the queries k of set c of softmax_k(pool_scale q . k) (r[k, b] - threshold)     `_smooth`

A program takes 8 whole sets of queries, 16 queries of each at a time, or for n one set. It reads [queries, context
sets], which is small beside the affinities.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from itm_fast._workspace import scratch_bytes
from itm_fast.packing import stretches

from . import _launch, _tiles
from ._affinity import gram, leading
from ._attention import Attended
from ._attention_backward import coefficients
from ._tl import EPS, NEVER, query_lanes


@triton.jit
def _unmatched(over, n_at, inside, POOL: tl.constexpr):
    """Which queries of a tile the pools of negative similarities count: n < 0 or NaN; `over` is r - threshold."""
    if POOL == "smoothed_negative":
        over = tl.load(n_at, mask=inside, other=0.0)
    return tl.where(over >= 0, 0, 1) != 0


@triton.jit(
    do_not_specialize=["set_first", "sets", "row_first", "columns", "in16", "stride_b", "stride_c"],
    do_not_specialize_on_alignment=["out_ptr"],  # points to the piece's first score, at any alignment
)
def _pool(
    r_ptr, n_ptr, start_ptr, size_ptr, out_ptr, set_first, sets, row_first, columns, in16, stride_b, stride_c,
    pool_scale, threshold, POOL: tl.constexpr, SETS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """out[b, c], by its strides, = pool over the queries q of set c of r [queries, columns context sets].

    `n_ptr`: n, shaped like r, of pool "smoothed_negative" only.
    One program: SETS sets of queries with BLOCK_B sets of contexts. Grid: groups of SETS x blocks of context sets.
    """
    chunks = tl.cdiv(columns, BLOCK_B)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane, start, size = query_lanes(start_ptr, size_ptr, set_first, group, sets, SETS, BLOCK_Q)
    start -= row_first
    b = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    m = tl.full((SETS, BLOCK_B), NEVER, tl.float32)
    total = tl.zeros((SETS, BLOCK_B), tl.float32)
    for first in range(0, tl.max(size, 0), BLOCK_Q):
        q = first + lane
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
            r = tl.load(at, mask=inside, other=0.0)
            if POOL == "negative" or POOL == "smoothed_negative":
                r = tl.where(inside, r - threshold, 0.0)
                n = _unmatched(r, n_ptr + (start + q).to(tl.int64)[:, None] * (in16 * 16) + b[None, :], inside, POOL)
                r = tl.where(n, r, 0.0)
            total += tl.sum(r.reshape(SETS, BLOCK_Q, BLOCK_B), 1)
    c = group * SETS + tl.arange(0, SETS)
    if POOL == "lse":
        total = (m + tl.log(total)) / pool_scale
    elif POOL == "max":
        total = m + total
    elif POOL != "sum":
        size = tl.load(size_ptr + set_first + c, mask=c < sets, other=1)
        total = total / size.to(tl.float32)[:, None]
    out = out_ptr + b.to(tl.int64)[None, :] * stride_b + c.to(tl.int64)[:, None] * stride_c
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(c < sets)[:, None] & (b < columns)[None, :])


@triton.jit
def _similarity(dot_ptr, square_ptr, length_ptr, at, row, inside_row, inside, GRAM: tl.constexpr):
    """t, |P|^2, c = |q| |P|, r and |q| of a tile; r is -inf outside. Without GRAM r = t, and the others are not used.

    `row`: the queries among all queries.
    """
    dot = tl.load(dot_ptr + at, mask=inside, other=0.0)
    square, c, r, length = dot, dot, dot, row
    if GRAM:
        length = tl.load(length_ptr + row, mask=inside_row, other=0.0)
        square = tl.load(square_ptr + at, mask=inside, other=0.0)
        c = length[:, None] * tl.sqrt(square)
        r = dot / tl.maximum(c, EPS)
    return dot, square, c, tl.where(inside, r, NEVER), length


@triton.jit(do_not_specialize=["set_first", "row_first", "columns", "in16", "gram16", "gram_first"])
def _smooth(
    dot_ptr, square_ptr, length_ptr, gram_ptr, start_ptr, size_ptr, out_ptr,
    set_first, row_first, columns, in16, gram16, gram_first, pool_scale, threshold,
    GRAM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """out [queries, columns context sets] = n, from t and |P|^2, shaped alike, and the Gram matrices of query sets.

    `gram_ptr` [query rows from gram_first on, stride]: products of each query with those of its set.
    One program: one set of queries with BLOCK_B sets of contexts. Grid: sets of queries x blocks of context sets.
    """
    chunks = tl.cdiv(columns, BLOCK_B)
    c, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    start = tl.load(start_ptr + set_first + c)
    size = tl.load(size_ptr + set_first + c)
    lane = tl.arange(0, BLOCK_Q)
    b = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    for first in range(0, size, BLOCK_Q):
        q = first + lane
        line = gram_ptr + (start - gram_first + q).to(tl.int64)[:, None] * (gram16 * 16)
        m = tl.full((BLOCK_Q,), NEVER, tl.float32)
        for other in range(0, size, BLOCK_Q):
            k = other + lane
            inside = (q < size)[:, None] & (k < size)[None, :]
            g = tl.load(line + k[None, :], mask=inside, other=0.0)
            m = tl.maximum(m, tl.max(tl.where((k < size)[None, :], pool_scale * g, NEVER), 1))
        z = tl.zeros((BLOCK_Q,), tl.float32)
        n = tl.zeros((BLOCK_Q, BLOCK_B), tl.float32)
        for other in range(0, size, BLOCK_Q):
            k = other + lane
            inside = (q < size)[:, None] & (k < size)[None, :]
            g = tl.load(line + k[None, :], mask=inside, other=0.0)
            e = tl.exp(tl.where((k < size)[None, :], pool_scale * g, NEVER) - m[:, None])
            real = (k < size)[:, None] & (b < columns)[None, :]
            at = (start - row_first + k).to(tl.int64)[:, None] * (in16 * 16) + b[None, :]
            _, _, _, r, _ = _similarity(dot_ptr, square_ptr, length_ptr, at, start + k, k < size, real, GRAM)
            z += tl.sum(e, 1)
            n = tl.dot(e, tl.where(real, r - threshold, 0.0), n, input_precision=PRECISION)
        at = (start - row_first + q).to(tl.int64)[:, None] * (in16 * 16) + b[None, :]
        tl.store(out_ptr + at, n / z[:, None], mask=(q < size)[:, None] & (b < columns)[None, :])


@triton.jit(
    do_not_specialize=["set_first", "sets", "row_first", "columns", "in16", "stride_b", "stride_c"],
    do_not_specialize_on_alignment=["grad_ptr"],  # points to the piece's first score, at any alignment
)
def _pool_backward(
    dot_ptr, square_ptr, length_ptr, n_ptr, start_ptr, size_ptr, grad_ptr, w0_ptr, w1_ptr, w2_ptr, wq_ptr,
    set_first, sets, row_first, columns, in16, stride_b, stride_c, pool_scale, threshold,
    POOL: tl.constexpr, GRAM: tl.constexpr, SETS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """w0, w1, w2 (see `_attention_backward`) and wq, where d q += wq q, from the scores' gradient `grad_ptr`.

    `dot_ptr`, `square_ptr` (|P|^2) and the results: [queries, columns context sets]. `length_ptr`: |q| of all queries,
    or what takes its place in r. Without GRAM r = t, and w2 and wq are not written. `n_ptr`: as in `_pool`.
    One program: SETS sets of queries with BLOCK_B sets of contexts. Grid: groups of SETS x blocks of context sets.
    """
    chunks = tl.cdiv(columns, BLOCK_B)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane, start, size = query_lanes(start_ptr, size_ptr, set_first, group, sets, SETS, BLOCK_Q)
    b = chunk * BLOCK_B + tl.arange(0, BLOCK_B)
    set_ = group * SETS + tl.arange(0, SETS)
    m = tl.full((SETS, BLOCK_B), NEVER, tl.float32)
    total = tl.zeros((SETS, BLOCK_B), tl.float32)
    best = tl.zeros((SETS, BLOCK_B), tl.int32)
    if POOL == "lse" or POOL == "max":
        for first in range(0, tl.max(size, 0), BLOCK_Q):
            q = first + lane
            inside = (q < size)[:, None] & (b < columns)[None, :]
            at = (start - row_first + q).to(tl.int64)[:, None] * (in16 * 16) + b[None, :]
            _, _, _, r, _ = _similarity(dot_ptr, square_ptr, length_ptr, at, start + q, q < size, inside, GRAM)
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
    if POOL != "lse" and POOL != "max" and POOL != "sum":
        count = tl.load(size_ptr + set_first + set_, mask=set_ < sets, other=1)
        grad = grad / count.to(tl.float32)[:, None]
    base = m + tl.log(total)
    for first in range(0, tl.max(size, 0), BLOCK_Q):
        q = first + lane
        inside = (q < size)[:, None] & (b < columns)[None, :]
        at = (start - row_first + q).to(tl.int64)[:, None] * (in16 * 16) + b[None, :]
        dot, square, c, r, length = _similarity(
            dot_ptr, square_ptr, length_ptr, at, start + q, q < size, inside, GRAM
        )
        d_r = tl.broadcast_to(grad[:, None, :], (SETS, BLOCK_Q, BLOCK_B))
        if POOL == "lse":
            d_r = d_r * tl.exp(pool_scale * r.reshape(SETS, BLOCK_Q, BLOCK_B) - base[:, None, :])
        elif POOL == "max":
            d_r = tl.where(first + tl.arange(0, BLOCK_Q)[None, :, None] == best[:, None, :], d_r, 0.0)
        d_r = d_r.reshape(SETS * BLOCK_Q, BLOCK_B)
        if POOL == "negative" or POOL == "smoothed_negative":
            d_r = tl.where(_unmatched(r - threshold, n_ptr + at, inside, POOL), d_r, 0.0)
        if GRAM:
            long = c >= EPS
            d_c = tl.where(long, -d_r * r / tl.where(long, c, 1.0), 0.0)
            p = tl.where(long, tl.sqrt(square), 1.0)
            w1 = d_r / tl.maximum(c, EPS)
            w2 = d_c * length[:, None] / p
            tl.store(w0_ptr + at, w1 * dot + w2 * square, mask=inside)
            tl.store(w1_ptr + at, w1, mask=inside)
            tl.store(w2_ptr + at, w2, mask=inside)
            tl.store(wq_ptr + at, tl.where(long, d_c * p / length[:, None], 0.0), mask=inside)
        else:
            tl.store(w0_ptr + at, d_r * dot, mask=inside)
            tl.store(w1_ptr + at, d_r, mask=inside)


def smoothed(
    query: _launch.Sets, piece: _launch.Piece, dot: Tensor, attended: Attended, length: Tensor | None, scale: float,
    threshold: float,
) -> Tensor:  # fmt: skip
    """n of a piece, shaped like `dot`: r if `attended` is of mode "score", else t, from which r follows."""
    n, rows = torch.empty_like(dot), query.rows
    has_gram = attended.gram and dot is not attended.out
    columns = piece.contexts.stop - piece.contexts.start
    tile = _tiles.smooth(rows.dtype, _launch.arch(rows.device))
    most = scratch_bytes(rows.device) // (16 * (query.longest + 16))  # rows of Gram matrices: a quarter of the scratch
    for part in stretches(query.edge[piece.queries.start : piece.queries.stop + 1], most):
        first, last = piece.queries.start + part.start, piece.queries.start + part.stop
        size = query.edge[last] - query.edge[first], leading(query.longest)
        products = torch.empty(size, dtype=torch.float32, device=rows.device)
        gram(query, first, last, products)
        _smooth[((last - first) * _launch.blocks(columns, tile["BLOCK_B"]),)](
            dot, attended.out, dot if length is None else length, products, query.start, query.size, n,
            first, piece.q.start, columns, dot.stride(0) // 16, products.stride(0) // 16, query.edge[first], scale,
            threshold, GRAM=has_gram, PRECISION=_tiles.exact(rows.dtype), **tile,
        )  # fmt: skip
    return n


def pooled(
    attended: Attended, query: _launch.Sets, piece: _launch.Piece, out: Tensor, how: str, scale: float,
    threshold: float,
) -> None:  # fmt: skip
    """Write the scores of a piece, pooled from r, into out: a view [context sets, query sets] of all scores."""
    r = n = attended.out
    if how == "smoothed_negative":
        n = smoothed(query, piece, r, attended, None, scale, threshold)
    tile = _tiles.pool(query.rows.dtype, _launch.arch(r.device))
    sets, columns = piece.queries.stop - piece.queries.start, piece.contexts.stop - piece.contexts.start
    part = out[piece.contexts, piece.queries]
    _pool[(_launch.blocks(sets, tile["SETS"]) * _launch.blocks(columns, tile["BLOCK_B"]),)](
        r, n, query.start, query.size, part, piece.queries.start, sets, piece.q.start, columns, r.stride(0) // 16,
        *part.stride(), scale, threshold, POOL=how, **tile,
    )  # fmt: skip


def pool_backward(
    query: _launch.Sets, piece: _launch.Piece, attended: Attended, length: Tensor | None, grad: Tensor, how: str,
    scale: float, threshold: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """w0, w1 and, with |P|^2, w2 and wq of a piece from the gradient of all scores, a view [context sets, query sets].
    """
    w = coefficients(attended.out, 4 if attended.gram else 2)
    n = attended.dot
    if how == "smoothed_negative":
        n = smoothed(query, piece, attended.dot, attended, length, scale, threshold)
    tile = _tiles.pool_backward(query.rows.dtype, _launch.arch(grad.device))
    sets, columns = piece.queries.stop - piece.queries.start, piece.contexts.stop - piece.contexts.start
    part = grad[piece.contexts, piece.queries]
    _pool_backward[(_launch.blocks(sets, tile["SETS"]) * _launch.blocks(columns, tile["BLOCK_B"]),)](
        attended.dot, attended.out, attended.dot if length is None else length, n, query.start, query.size, part,
        w[0], w[1], w[-2], w[-1], piece.queries.start, sets, piece.q.start, columns, attended.out.stride(0) // 16,
        *part.stride(), scale, threshold, POOL=how, GRAM=attended.gram, **tile,
    )  # fmt: skip
    return w


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    single = torch.float32
    for how in ("lse", "max", "sum", "mean", "negative", "smoothed_negative"):
        types = f"*fp32 *fp32 *i32 *i32 *{'fp16' if how == 'lse' else 'fp32'} i32 i32 i32 i32 i32 i32 i32 fp32 fp32"
        yield _tiles.Compilation(_pool, types, dict(POOL=how), _tiles.pool(single, arch))
        grad = "*fp16" if how == "lse" else "*fp32"
        types = f"*fp32 *fp32 *fp32 *fp32 *i32 *i32 {grad}" + " *fp32" * 4 + " i32" * 7 + " fp32 fp32"
        for has_gram in (True, False):
            constants = dict(POOL=how, GRAM=has_gram)
            yield _tiles.Compilation(_pool_backward, types, constants, _tiles.pool_backward(single, arch))
    types = "*fp32 *fp32 *fp32 *fp32 *i32 *i32 *fp32" + " i32" * 6 + " fp32 fp32"
    for dtype, has_gram in ((single, True), (single, False), (torch.float16, False)):
        constants = dict(GRAM=has_gram, PRECISION=_tiles.exact(dtype))
        yield _tiles.Compilation(_smooth, types, constants, _tiles.smooth(dtype, arch))
