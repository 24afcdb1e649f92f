"""Backward of attention over sets of contexts, without the attended vectors P: (8) to (11) of `cross_attention_score`.

Both cross-attention ops first compute three numbers w0, w1, w2 for each query q and set b of contexts, such that

    d alpha_x = w1 F_x + w2 (G alpha)_x,    sum_x alpha_x d alpha_x = w0
    d A'      = scale alpha (d alpha - w0),  then d A through the norm over the queries         `_logit_gradient`
    M         = sum_q w2 alpha alpha^T                                                          `_gram_gradient`
    d x      += M x                                                                             `_apply`

For the score (`_pooling`), F = A, w1 = d t, w2 = 2 d(p^2), and d A += w1 alpha because t also depends on A directly.
For the similarity (`_projection_backward`), F = x . d u, and w1 and w2 turn d u into d P.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._attention import Attended, with_grams
from ._norms import Norm, norm_of
from ._tl import EPS, leaky_slope, normalised, query_lanes


@triton.jit
def tile_gradient(
    logit_ptr, norm, alpha_ptr, product_ptr, f_ptr, w0_ptr, w1_ptr, w2_ptr, at, at_b, inside, scale,
    NORM: tl.constexpr, CLIP: tl.constexpr, DIRECT: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """A, A' and d A' of a tile, and the part of d A that does not pass through A' (w1 alpha when DIRECT, else 0).

    Without GRAM there is no w2 (G alpha).
    """
    s = tl.load(logit_ptr + at, mask=inside, other=0.0)
    alpha = tl.load(alpha_ptr + at, mask=inside, other=0.0)
    f = s
    if not DIRECT:
        f = tl.load(f_ptr + at, mask=inside, other=0.0)
    w1 = tl.load(w1_ptr + at_b, mask=inside, other=0.0)
    d_alpha = w1 * f - tl.load(w0_ptr + at_b, mask=inside, other=0.0)
    if GRAM:
        product = tl.load(product_ptr + at, mask=inside, other=0.0)
        d_alpha += tl.load(w2_ptr + at_b, mask=inside, other=0.0) * product
    direct = 0.0 * w1
    if DIRECT:
        direct = w1 * alpha
    return s, normalised(s, norm, NORM, CLIP, False), scale * alpha * d_alpha, direct


@triton.jit(
    do_not_specialize=["set_first", "sets", "row_first", "context_first", "contexts", "b_first", "ld16", "in16"]
)
def _logit_gradient(
    logit_ptr, norm_ptr, alpha_ptr, product_ptr, f_ptr, w0_ptr, w1_ptr, w2_ptr, start_ptr, size_ptr,
    context_start_ptr, context_size_ptr, context_owner_ptr, out_ptr,
    set_first, sets, row_first, context_first, contexts, b_first, ld16, in16, scale,
    NORM: tl.constexpr, CLIP: tl.constexpr, DIRECT: tl.constexpr, GRAM: tl.constexpr,
    SETS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """out [queries, contexts] = d A. `logit_ptr`, `alpha_ptr`, `product_ptr` (G alpha) and `f_ptr` are laid out alike.

    `norm_ptr` [sets, contexts]; w0, w1, w2 [queries, context sets]. DIRECT: F is A, and d A += w1 alpha. Without GRAM
    w2 and G alpha are not read.
    One program: SETS sets of queries with BLOCK_X context rows. Grid: groups of sets x blocks of context rows.
    """
    chunks = tl.cdiv(contexts, BLOCK_X)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane, start, size = query_lanes(start_ptr, size_ptr, set_first, group, sets, SETS, BLOCK_Q)
    start -= row_first
    x = chunk * BLOCK_X + tl.arange(0, BLOCK_X)
    row = context_first + tl.minimum(x, contexts - 1)
    b = tl.load(context_owner_ptr + row)
    counted = (x < contexts) & (row - tl.load(context_start_ptr + b) < tl.load(context_size_ptr + b))
    b -= b_first
    norm = tl.zeros((SETS, BLOCK_X), tl.float32)
    if NORM != "none":
        set_ = group * SETS + tl.arange(0, SETS)
        norms = norm_ptr + set_.to(tl.int64)[:, None] * (ld16 * 16) + x[None, :]
        norm = tl.load(norms, mask=(set_ < sets)[:, None] & counted[None, :], other=0.0)
    spread = tl.broadcast_to(norm[:, None, :], (SETS, BLOCK_Q, BLOCK_X)).reshape(SETS * BLOCK_Q, BLOCK_X)
    along = tl.zeros((SETS, BLOCK_X), tl.float32)  # sum over the queries of A' . d A'
    if NORM != "none":
        for first in range(0, tl.max(size, 0), BLOCK_Q):
            q = first + lane
            inside = (q < size)[:, None] & counted[None, :]
            line = (start + q).to(tl.int64)[:, None]
            at, at_b = line * (ld16 * 16) + x[None, :], line * (in16 * 16) + b[None, :]
            _, a, d_a, _ = tile_gradient(
                logit_ptr, spread, alpha_ptr, product_ptr, f_ptr, w0_ptr, w1_ptr, w2_ptr, at, at_b, inside, scale,
                NORM, CLIP, DIRECT, GRAM,
            )  # fmt: skip
            along += tl.sum(tl.where(inside, a * d_a, 0.0).reshape(SETS, BLOCK_Q, BLOCK_X), 1)
    if NORM == "l2norm":
        along = tl.where(norm > 0, along * (norm + EPS) / norm, 0.0)
    total = tl.broadcast_to(along[:, None, :], (SETS, BLOCK_Q, BLOCK_X)).reshape(SETS * BLOCK_Q, BLOCK_X)
    for first in range(0, tl.max(size, 0), BLOCK_Q):
        q = first + lane
        inside = (q < size)[:, None] & counted[None, :]
        line = (start + q).to(tl.int64)[:, None]
        at, at_b = line * (ld16 * 16) + x[None, :], line * (in16 * 16) + b[None, :]
        s, a, d_a, direct = tile_gradient(
            logit_ptr, spread, alpha_ptr, product_ptr, f_ptr, w0_ptr, w1_ptr, w2_ptr, at, at_b, inside, scale,
            NORM, CLIP, DIRECT, GRAM,
        )  # fmt: skip
        if NORM == "softmax":
            d_s = a * (d_a - total)
        elif NORM == "l2norm":
            d_s = (d_a - a * total) / (spread + EPS)
        elif NORM == "l1norm":
            sign = tl.where(s > 0, 1.0, tl.where(s < 0, -1.0, 0.0))
            d_s = (d_a - sign * total) / (spread + EPS)
        else:
            d_s = d_a
        if CLIP:
            d_s = d_s * leaky_slope(s)
        tl.store(out_ptr + at, d_s + direct, mask=inside)


@triton.jit(do_not_specialize=["set_first", "context_first", "queries", "chunks", "ld16", "in16", "gram16"])
def _gram_gradient(
    alpha_ptr, w2_ptr, start_ptr, size_ptr, out_ptr, set_first, context_first, queries, chunks, ld16, in16, gram16,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """out [context rows, stride] += M = sum_q w2 alpha alpha^T of each set, laid out like its Gram matrix.

    One program: [BLOCK_X, BLOCK_X] of one set's M. Grid: sets x chunks x chunks, for the longest set.
    """
    pid = tl.program_id(0)
    b, i, j = pid // (chunks * chunks), (pid // chunks) % chunks, pid % chunks
    start = tl.load(start_ptr + set_first + b) - context_first
    size = tl.load(size_ptr + set_first + b)
    if (i * BLOCK_X < size) & (j * BLOCK_X < size):
        x, y = i * BLOCK_X + tl.arange(0, BLOCK_X), j * BLOCK_X + tl.arange(0, BLOCK_X)
        acc = tl.zeros((BLOCK_X, BLOCK_X), tl.float32)
        for first in range(0, queries, BLOCK_Q):
            q = first + tl.arange(0, BLOCK_Q)
            real = q < queries
            line = alpha_ptr + q.to(tl.int64)[:, None] * (ld16 * 16) + start
            w2 = tl.load(w2_ptr + q.to(tl.int64) * (in16 * 16) + b, mask=real, other=0.0)
            left = tl.load(line + x[None, :], mask=real[:, None] & (x < size)[None, :], other=0.0) * w2[:, None]
            right = tl.load(line + y[None, :], mask=real[:, None] & (y < size)[None, :], other=0.0)
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        out = out_ptr + (start + x).to(tl.int64)[:, None] * (gram16 * 16) + y[None, :]
        inside = (x < size)[:, None] & (y < size)[None, :]
        tl.store(out, tl.load(out, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit(do_not_specialize=["set_first", "context_first", "chunks", "gram16"])
def _apply(
    m_ptr, row_ptr, start_ptr, size_ptr, out_ptr, set_first, context_first, chunks, gram16,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [all context rows, D] += M x of each set, from M (`m_ptr`) and the features x (`row_ptr`).

    One program: BLOCK_X rows and BLOCK_K columns of one set. Grid: sets x chunks of rows x chunks of columns.
    """
    columns: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    b, i, d = pid // (chunks * columns), (pid // columns) % chunks, pid % columns
    start = tl.load(start_ptr + set_first + b)
    size = tl.load(size_ptr + set_first + b)
    if i * BLOCK_X < size:
        x, k = i * BLOCK_X + tl.arange(0, BLOCK_X), d * BLOCK_K + tl.arange(0, BLOCK_K)
        line = m_ptr + (start - context_first + x).to(tl.int64)[:, None] * (gram16 * 16)
        acc = tl.zeros((BLOCK_X, BLOCK_K), tl.float32)
        for j in range(0, size, BLOCK_X):
            y = j + tl.arange(0, BLOCK_X)
            m = tl.load(line + y[None, :], mask=(x < size)[:, None] & (y < size)[None, :], other=0.0)
            inside = (y < size)[:, None] & (k < D)[None, :]
            v = tl.load(row_ptr + (start + y).to(tl.int64)[:, None] * D + k[None, :], mask=inside, other=0.0)
            acc = tl.dot(m, v.to(tl.float32), acc, input_precision=PRECISION)
        out = out_ptr + (start + x).to(tl.int64)[:, None] * D + k[None, :]
        inside = (x < size)[:, None] & (k < D)[None, :]
        tl.store(out, tl.load(out, mask=inside, other=0.0) + acc, mask=inside)


# Scratch floats, backward: per query row and context row (A, alpha, G alpha, d A, at worst a norm), and per query row
# and set of contexts (t, |P|^2, w0, w1, w2, wq).
EACH_ROW, EACH_SET = 5, 6


class Gradients:
    """Sums over pieces of the gradients of queries and contexts.

    Attributes:
        query, context: [rows, D] float32 sums so far, or None for a side that needs no gradient.
    """

    def __init__(self, query: _launch.Sets, context: _launch.Sets, needs: tuple[bool, bool]) -> None:
        self.sets = query, context
        self.query, self.context = (
            torch.zeros(s.rows.shape, dtype=torch.float32, device=s.rows.device) if n else None
            for s, n in zip(self.sets, needs)
        )

    def add(self, piece: _launch.Piece, logits: Tensor) -> None:
        """Add both sides' gradients through the affinities of a piece, given d A (`logits`) [queries, contexts]."""
        query, context = self.sets
        logits = logits[:, : piece.x.stop - piece.x.start]
        if self.query is not None:
            self.query[piece.q].addmm_(logits, context.rows[piece.x].float())
        if self.context is not None:
            self.context[piece.x].addmm_(logits.t(), query.rows[piece.q].float())

    def with_grams(
        self, pieces: Iterable[_launch.Piece], needed: bool = True
    ) -> Iterator[tuple[_launch.Piece, Any, Any]]:
        """Every piece with its contexts' Gram matrices and M; M is applied after the last piece that adds to it.

        If the Gram matrices are not `needed`, None is in their place and in that of M.
        """
        if not needed:
            yield from ((piece, None, None) for piece in pieces)
            return
        done, m = slice(0, 0), torch.empty(0)
        for piece, gram in with_grams(self.sets[1], pieces):
            if done != piece.contexts:
                self.apply(done, m)
                done, m = piece.contexts, torch.zeros_like(gram)
            yield piece, gram, m
        self.apply(done, m)

    def apply(self, contexts: slice, m: Tensor) -> None:
        """Add the contexts' gradient through their Gram matrices: M x."""
        context = self.sets[1]
        if self.context is None or contexts.stop == contexts.start:
            return
        rows = context.rows
        tile, D = _tiles.apply(rows.dtype, _launch.arch(rows.device)), rows.shape[1]
        chunks = _launch.blocks(context.longest, tile["BLOCK_X"])
        _apply[((contexts.stop - contexts.start) * chunks * _launch.blocks(D, tile["BLOCK_K"]),)](
            m, rows, context.start, context.size, self.context, contexts.start, context.edge[contexts.start], chunks,
            m.stride(0) // 16, D=D, PRECISION=_tiles.exact(rows.dtype), **tile,
        )  # fmt: skip


def coefficients(like: Tensor, n: int) -> tuple[Tensor, ...]:
    """n tensors shaped like `Attended.out`, zero because kernels do not write the rows of padding regions."""
    return torch.zeros(n, *like.shape, dtype=torch.float32, device=like.device).unbind(0)


def logit_gradient(
    query: _launch.Sets,
    context: _launch.Sets,
    piece: _launch.Piece,
    attended: Attended,
    f: Tensor | None,
    w: tuple[Tensor, ...],
    norm: Norm,
    scale: float,
) -> Tensor:
    """d A of a piece, shaped like its affinities; f is F, or None when F is A. w: w0, w1 and, with |P|^2, w2."""
    out = torch.zeros_like(attended.logits)
    sets, contexts = piece.queries.stop - piece.queries.start, piece.x.stop - piece.x.start
    tile = _tiles.logit_gradient(query.rows.dtype, _launch.arch(out.device), attended.gram)
    _logit_gradient[(_launch.blocks(sets, tile["SETS"]) * _launch.blocks(contexts, tile["BLOCK_X"]),)](
        attended.logits, attended.norms, attended.alpha, attended.product, attended.logits if f is None else f,
        w[0], w[1], w[2] if attended.gram else w[1],
        query.start, query.size, context.start, context.size, context.owner, out,
        piece.queries.start, sets, piece.q.start, piece.x.start, contexts, piece.contexts.start,
        out.stride(0) // 16, w[0].stride(0) // 16, scale, NORM=norm.NORM, CLIP=norm.CLIP, DIRECT=f is None,
        GRAM=attended.gram, **tile,
    )  # fmt: skip
    return out


def gram_gradient(context: _launch.Sets, piece: _launch.Piece, attended: Attended, w2: Tensor, m: Tensor) -> None:
    """Add a piece's part of M to m, which has the layout of the Gram matrices of its context sets."""
    tile = _tiles.gram_gradient(context.rows.dtype, _launch.arch(m.device))
    chunks = _launch.blocks(context.longest, tile["BLOCK_X"])
    _gram_gradient[((piece.contexts.stop - piece.contexts.start) * chunks * chunks,)](
        attended.alpha, w2, context.start, context.size, m, piece.contexts.start, piece.x.start,
        piece.q.stop - piece.q.start, chunks, attended.alpha.stride(0) // 16, w2.stride(0) // 16, m.stride(0) // 16,
        PRECISION=_tiles.exact(context.rows.dtype), **tile,
    )  # fmt: skip


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for name in ("softmax", "l1norm", "clipped_l2norm", "none"):
        types = "*fp32 " * 8 + "*i32 " * 5 + "*fp32" + " i32" * 8 + " fp32"
        for direct, gram in ((True, True), (False, True), (True, False), (False, False)):
            constants = dict(norm_of(name)._asdict(), DIRECT=direct, GRAM=gram)
            tile = _tiles.logit_gradient(torch.float32, arch, gram)
            yield _tiles.Compilation(_logit_gradient, types, constants, tile)
    for dtype, t in _tiles.NAMES.items():
        constants = dict(PRECISION=_tiles.exact(dtype))
        if dtype != torch.bfloat16:
            types = "*fp32 *fp32 *i32 *i32 *fp32" + " i32" * 7
            yield _tiles.Compilation(_gram_gradient, types, constants, _tiles.gram_gradient(dtype, arch))
        types = f"*fp32 *{t} *i32 *i32 *fp32" + " i32" * 4
        yield _tiles.Compilation(_apply, types, dict(constants, D=1024), _tiles.apply(dtype, arch))
