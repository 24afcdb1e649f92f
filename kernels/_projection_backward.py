"""Backward of the similarity vectors over D: (4) to (6) of `ops/cross_attention_similarity.py`.

    d u = 2 (u - q) W^T d y,    (u - q)^2 for d W                                               `_difference_gradient`
    F_x = x . d u,    k = d u . u = sum_x alpha_x F_x / (|P| + eps)                             `_pair_rows`
    d x += sum_q alpha_x d u / (|P| + eps)                                                      `_pair_rows`

d u and (u - q)^2 [queries, sets, D] of a piece are workspaces. With p = |P|,
d P = d u / (p + eps) - k P / (p (p + eps)), so `_attention_backward` is given w1 = 1 / (p + eps),
w2 = -k / (p (p + eps)) and w0 = P . d P = k eps / (p + eps).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._attention import Attended
from ._pair_rows import attended_columns
from ._tl import EPS, rows_of


@triton.jit(do_not_specialize=["set_first", "sets", "context_first", "query_first", "queries", "ld16", "in16"])
def _difference_gradient(
    alpha_ptr, square_ptr, dy_ptr, query_ptr, context_ptr, weight_ptr, start_ptr, size_ptr, du_ptr, squares_ptr,
    set_first, sets, context_first, query_first, queries, ld16, in16,
    D: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """du = 2 (u - q) W^T d y and squares = (u - q)^2, both [queries, sets, D] float32, from d y [queries, sets, S].

    `alpha_ptr` and `square_ptr` (|P|^2): as mode "backward" of `_attend` leaves them.
    One program: BLOCK_Q queries with one set, BLOCK_K columns. Grid: blocks of queries x sets x blocks of columns.
    """
    columns: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    tile, b, d = pid // (sets * columns), (pid // columns) % sets, pid % columns
    first = tile * BLOCK_Q
    q = tl.minimum(tl.arange(0, BLOCK_Q), queries - first - 1)  # past the end: the last row, not stored
    start = tl.load(start_ptr + set_first + b)
    size = tl.load(size_ptr + set_first + b)
    column = d * BLOCK_K + tl.arange(0, BLOCK_K)
    x = tl.arange(0, BLOCK_X)
    context = context_ptr + start.to(tl.int64) * D
    alphas = alpha_ptr + first.to(tl.int64) * (ld16 * 16) + start - context_first + q[:, None] * (ld16 * 16)
    alpha = 0.0
    if WHOLE:
        alpha = tl.load(alphas + x[None, :], mask=(x < size)[None, :], other=0.0).to(context_ptr.dtype.element_ty)
    u = attended_columns(
        alphas, alpha, context, size, x, column, D, WHOLE, False, PRECISION, BLOCK_Q, BLOCK_X, BLOCK_K, BLOCK_X
    )
    square = tl.load(square_ptr + first.to(tl.int64) * (in16 * 16) + b + q * (in16 * 16))
    query = query_ptr + (query_first + first).to(tl.int64) * D
    difference = u / (tl.sqrt(square) + EPS)[:, None] - rows_of(query, q, column, D, BLOCK_K).to(tl.float32)
    along = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)  # W^T d y
    line = (first.to(tl.int64) * sets + b) + q * sets
    for first_s in range(0, S, BLOCK_S):
        s = first_s + tl.arange(0, BLOCK_S)
        dy = tl.load(dy_ptr + line[:, None] * S + s[None, :], mask=(s < S)[None, :], other=0.0)
        inside = (s < S)[:, None] & (column < D)[None, :]
        weight = tl.load(weight_ptr + s[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        along = tl.dot(dy, weight, along, input_precision=PRECISION)
    at = line[:, None] * D + column[None, :]
    inside = (tl.arange(0, BLOCK_Q) < queries - first)[:, None] & (column < D)[None, :]
    tl.store(du_ptr + at, 2 * difference * along, mask=inside)
    tl.store(squares_ptr + at, difference * difference, mask=inside)


def difference_gradient(
    query: _launch.Sets, context: _launch.Sets, piece: _launch.Piece, attended: Attended, weight: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """d u and (u - q)^2 [queries, sets, D] of a piece from d y [queries, sets, S]."""
    rows, (S, D) = query.rows, weight.shape
    queries, sets = dy.shape[:2]
    du, squares = torch.empty(2, queries, sets, D, dtype=torch.float32, device=rows.device).unbind(0)
    precision = _tiles.products(rows.dtype)
    tile = _tiles.difference_gradient(rows.dtype, _launch.arch(rows.device), precision)
    tile["BLOCK_S"] = min(tile["BLOCK_S"], _launch.power_of_two(S))
    grid = _launch.blocks(queries, tile["BLOCK_Q"]) * sets * _launch.blocks(D, tile["BLOCK_K"])
    _difference_gradient[(grid,)](
        attended.alpha, attended.out, dy, rows, context.rows, weight, context.start, context.size, du, squares,
        piece.contexts.start, sets, piece.x.start, piece.q.start, queries,
        attended.alpha.stride(0) // 16, attended.out.stride(0) // 16,
        D=D, S=S, WHOLE=context.whole, PRECISION=precision, BLOCK_X=context.tile, **tile,
    )  # fmt: skip
    return du, squares


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    wide, narrow = _launch.REGIONS, _launch.WORDS
    for dtype, t in _tiles.NAMES.items():
        for precision in _tiles.precisions(dtype):
            types = f"*fp32 *fp32 *fp32 *{t} *{t} *{t} *i32 *i32 *fp32 *fp32" + " i32" * 7
            for whole, rows in ((True, wide), (False, narrow)):
                constants = dict(D=1024, S=256, WHOLE=whole, PRECISION=precision, BLOCK_X=rows)
                tile = _tiles.difference_gradient(dtype, arch, precision)
                yield _tiles.Compilation(_difference_gradient, types, constants, tile)
