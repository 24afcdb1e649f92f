"""Similarity vectors of attended queries: equations (1) to (3) of `ops/cross_attention_similarity.py`.

    u = alpha x / (|P| + eps),    y = W (u - q)^2 + b,    s = y / (|y| + eps)                   `project`

One pass over D: u, the difference, its square and the product with W of a tile stay in registers and shared memory.
z alpha and 1 / (z (|P| + eps)) come from `_attention`. Queries are packed, so all rows of a tile are real work. In the
product alpha x, 36 regions fill 56 % of a tile's 64 context rows, but it has a fifth of the operations of the product
with W. SGRAF's global similarity vector comes from the same pass, with the image's global vector for u (GLOBAL).
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


@triton.jit
def _products(
    alphas, alpha, inverse, query, context, weight_ptr, bias_ptr, size, q, first_s,
    D: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr, GLOBAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y = W (u - q)^2 + b [BLOCK_Q, BLOCK_S] of a tile of queries, for the rows of W from first_s on."""
    s = first_s + tl.arange(0, BLOCK_S)
    x, k = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
    for step in range(0, D, BLOCK_K):
        column = step + k
        u = attended_columns(
            alphas, alpha, context, size, x, column, D, WHOLE, GLOBAL, PRECISION, BLOCK_Q, BLOCK_X, BLOCK_K, ROWS
        )
        difference = u * inverse - rows_of(query, q, column, D, BLOCK_K).to(tl.float32)
        square = (difference * difference).to(query.dtype.element_ty)
        weight = rows_of(weight_ptr, tl.minimum(s, S - 1), column, D, BLOCK_K)  # [BLOCK_S, BLOCK_K]
        acc = tl.dot(square, weight.T, acc, input_precision=PRECISION)
    y = acc + tl.load(bias_ptr + tl.minimum(s, S - 1)).to(tl.float32)[None, :]
    if S % BLOCK_S == 0:
        return y
    return tl.where((s < S)[None, :], y, 0.0)


@triton.jit(
    do_not_specialize=[
        "set_first", "sets", "context_first", "query_first", "queries", "ld16", "in16", "out_first", "out_rows",
        "place_first",
    ]
)
def _project(
    alpha_ptr, inverse_ptr, query_ptr, context_ptr, weight_ptr, bias_ptr, start_ptr, size_ptr,
    query_start_ptr, query_size_ptr, owner_ptr, place_ptr, out_ptr, gradient_ptr,
    set_first, sets, context_first, query_first, queries, ld16, in16, out_first, out_rows, place_first,
    D: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr, GLOBAL: tl.constexpr, BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """s = y / (|y| + eps) of every query with every set of contexts, into out [sets, out_rows, S].

    `alpha_ptr`: e, and `inverse_ptr`: 1 / (z (|P| + eps)), as mode "weights" of `_attend` leaves them. Query q's row in
    a set's part of out is place[q] - place_first; set 0 of the piece has part `out_first`. Padding regions give zeros.
    BACKWARD: `out_ptr` holds d s and d y goes to `gradient_ptr` [queries, sets, S] float32; `alpha_ptr` is alpha and
    `inverse_ptr` |P|^2.
    One program: BLOCK_Q packed queries with one set. Grid: blocks of queries x sets.
    """
    tile, b = tl.program_id(0) // sets, tl.program_id(0) % sets
    first = tile * BLOCK_Q
    q = tl.minimum(tl.arange(0, BLOCK_Q), queries - first - 1)  # past the end: the last row, not stored
    start = tl.load(start_ptr + set_first + b)
    size = tl.load(size_ptr + set_first + b)
    query = query_ptr + (query_first + first).to(tl.int64) * D
    context = context_ptr + start.to(tl.int64) * D
    alphas = alpha_ptr + first.to(tl.int64) * (ld16 * 16) + start - context_first + q[:, None] * (ld16 * 16)
    alpha = 0.0
    inverse = 1.0
    if not GLOBAL:
        inverse = tl.load(inverse_ptr + first.to(tl.int64) * (in16 * 16) + b + q * (in16 * 16))[:, None]
        if BACKWARD:  # `inverse` is |P|^2
            inverse = 1 / (tl.sqrt(inverse) + EPS)
    if WHOLE and BLOCK_X == ROWS and not GLOBAL:
        x = tl.arange(0, BLOCK_X)
        alpha = tl.load(alphas + x[None, :], mask=(x < size)[None, :], other=0.0).to(context_ptr.dtype.element_ty)
    gradients = gradient_ptr + (first.to(tl.int64) * sets + b) * S
    square = tl.zeros((BLOCK_Q,), tl.float32)
    along = tl.zeros((BLOCK_Q,), tl.float32)
    # If S is too wide for one tile, a first sweep computes the lengths |y|.
    for sweep in tl.static_range(0 if S > BLOCK_S else 1, 2):
        for first_s in range(0, S, BLOCK_S):
            y = _products(
                alphas, alpha, inverse, query, context, weight_ptr, bias_ptr, size, q, first_s,
                D, S, WHOLE, GLOBAL, PRECISION, BLOCK_Q, BLOCK_X, BLOCK_K, BLOCK_S, ROWS,
            )  # fmt: skip
            s = first_s + tl.arange(0, BLOCK_S)
            row = query_first + first + q
            owner = tl.load(owner_ptr + row)
            counted = row - tl.load(query_start_ptr + owner) < tl.load(query_size_ptr + owner)
            # As everywhere, a 64-bit offset to the tile, and offsets of 32 bits within it.
            place = tl.load(place_ptr + query_first + first)
            out = out_ptr + ((out_first + b).to(tl.int64) * out_rows - place_first + place) * S
            at = out + ((tl.load(place_ptr + row) - place).to(tl.int32) * S)[:, None] + s[None, :]
            inside = (tl.arange(0, BLOCK_Q) < queries - first)[:, None] & (s < S)[None, :]
            if BACKWARD:
                g = tl.load(at, mask=inside & counted[:, None], other=0.0).to(tl.float32)
            if sweep == 0 or S <= BLOCK_S:
                square += tl.sum(y * y, 1)
                if BACKWARD:
                    along += tl.sum(g * y, 1)
            if sweep == 1:
                length = tl.sqrt(square)
                if BACKWARD:
                    # d y of y / (|y| + eps), where g = d s and `along` = g . y: (4) of the op.
                    share = tl.where(length > 0, along / (length * (length + EPS)), 0.0)
                    dy = tl.where(counted[:, None], (g - share[:, None] * y) / (length + EPS)[:, None], 0.0)
                    tl.store(gradients + (q * sets)[:, None] * S + s[None, :], dy, mask=inside)
                else:
                    y = tl.where(counted[:, None], y / (length + EPS)[:, None], 0.0)
                    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=inside)


def project(
    query: _launch.Sets,
    context: _launch.Sets,
    piece: _launch.Piece,
    attended: Attended | None,
    weight: Tensor,
    bias: Tensor,
    place: Tensor,
    out: Tensor,
    *,
    out_first: int,
    place_first: int = 0,
    gradient: Tensor | None = None,
) -> None:
    """Write the similarity vectors of a piece into out [sets, rows of a set, S]; or, given `gradient`, write d y there.

    Args:
        attended: results of mode "weights", or of "backward" with `gradient`; None when each set of contexts is one
            global vector, which takes the place of u.
        weight, bias: [S, D] and [S], aligned.
        place: [all queries] int64, ascending: each query's row in a set's part of `out`.
        out: the result; with `gradient`, the gradient of the result, which is read.
        out_first: index in `out` of the piece's first set.
        place_first: subtracted from `place`.
        gradient: [queries, sets, S] float32, filled with d y.
    """
    rows = query.rows
    S, D = weight.shape
    precision = _tiles.products(rows.dtype)
    queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
    backward = gradient is not None
    arch = _launch.arch(rows.device)
    tile, constants = _constants(
        rows.dtype, arch, precision, backward, attended is None, S, context.whole, context.tile
    )
    alpha, inverse = out, out
    if attended is not None:
        alpha, inverse = (attended.alpha if backward else attended.logits), attended.out
    _project[(_launch.blocks(queries, tile["BLOCK_Q"]) * sets,)](
        alpha, inverse, rows, context.rows, weight, bias, context.start, context.size,
        query.start, query.size, query.owner, place, out, gradient if backward else out,
        piece.contexts.start, sets, piece.x.start, piece.q.start, queries,
        alpha.stride(0) // 16 if attended else 0, inverse.stride(0) // 16 if attended else 0,
        out_first, out.shape[1], place_first,
        D=D, GLOBAL=attended is None, **constants, **tile,
    )  # fmt: skip


def _constants(dtype, arch, precision, backward, overall, S, whole, rows):
    """The block sizes of `_project`, and its other constants."""
    tile = _tiles.project(dtype, arch, precision, backward, overall, S, whole)
    chunk = tile.pop("CHUNK")
    tile["BLOCK_S"] = min(tile["BLOCK_S"], _launch.power_of_two(S))
    x = min(chunk or rows, rows)
    return tile, dict(S=S, WHOLE=whole, BACKWARD=backward, PRECISION=precision, ROWS=rows, BLOCK_X=x)


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for dtype, t in _tiles.NAMES.items():
        for precision in _tiles.precisions(dtype):
            # images for contexts, global, backward, S
            ways = [(True, False, False, 256), (True, True, False, 256)]
            ways += [(False, False, False, 256), (True, False, True, 256)]
            if dtype == torch.float16:
                ways.append((True, False, False, 512))
            for images, overall, backward, S in ways:
                # A global vector needs no attention: `project` then passes the result for its arguments.
                alpha = f"*{t}" if overall else "*fp32"
                types = f"{alpha} {alpha} *{t} *{t} *{t} *{t} *i32 *i32 *i32 *i32 *i32 *i64 *{t} "
                types += ("*fp32" if backward else f"*{t}") + " i32" * 10
                rows = _launch.REGIONS if images else _launch.WORDS
                tile, constants = _constants(dtype, arch, precision, backward, overall, S, images, rows)
                yield _tiles.Compilation(
                    _project, types, dict(constants, D=1024, GLOBAL=overall), tile, products=not backward
                )
