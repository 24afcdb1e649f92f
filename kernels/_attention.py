"""Attention of packed queries over sets of contexts: `ops/_attention.py`, and (1) to (3) of `cross_attention_score`.

    norm[c, x]  = norm over the queries of set c of their affinities with context row x         `_query_norms`
    alpha[q, x] = softmax over the rows x of set b of scale * A'[q, x]                          `_attend`
    t[q, b]     = alpha_q . A_q,    |P|^2 [q, b] = alpha_q^T G_b alpha_q                        `_attend`
    r[q, b]     = t / max(|q| |P|, 1e-8)                                                        `_attend`

A' are the normalised affinities and G_b the Gram matrix of set b. A [queries, context rows] is a workspace. `_attend`
tiles the packed queries without regard to their sets, so its tiles are full in that direction; 36 regions fill 56 % of
a tile's 64 context rows. Only `_query_norms` works on whole sets of queries: 4 sets per program, 16 queries of each at
a time. COCO's captions fill 60 % of that, which costs little as the kernel is bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._affinity import affinity, gram, leading
from ._tl import CANCELLED, EPS, NEVER, leaky, normalised


@triton.jit(do_not_specialize=["set_first", "sets", "row_first", "contexts", "ld16"])
def _query_norms(
    logits_ptr, start_ptr, size_ptr, out_ptr, set_first, sets, row_first, contexts, ld16,
    NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr,
    SETS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """out [sets, contexts]: norm[c, x] from the affinities `logits_ptr` [queries, contexts]; INVERSE: 1 / (norm + eps).

    One program: SETS sets of queries with BLOCK_X context rows. Grid: groups of sets x blocks of context rows.
    """
    chunks = tl.cdiv(contexts, BLOCK_X)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lane = tl.arange(0, SETS * BLOCK_Q)
    c = group * SETS + lane // BLOCK_Q
    start = tl.load(start_ptr + set_first + c, mask=c < sets, other=0) - row_first
    size = tl.load(size_ptr + set_first + c, mask=c < sets, other=0)
    x = chunk * BLOCK_X + tl.arange(0, BLOCK_X)
    m = tl.full((SETS, BLOCK_X), NEVER, tl.float32)
    total = tl.zeros((SETS, BLOCK_X), tl.float32)
    for first in range(0, tl.max(size, 0), BLOCK_Q):
        q = first + lane % BLOCK_Q
        inside = (q < size)[:, None] & (x < contexts)[None, :]
        at = (start + q).to(tl.int64)[:, None] * (ld16 * 16) + x[None, :]
        if NORM == "softmax":
            s = tl.load(logits_ptr + at, mask=inside, other=NEVER).reshape(SETS, BLOCK_Q, BLOCK_X)
            larger = tl.maximum(m, tl.max(s, 1))
            base = tl.where(larger == NEVER, 0.0, larger)
            total = total * tl.exp(m - base) + tl.sum(tl.exp(s - base[:, None, :]), 1)
            m = larger
        else:
            s = tl.load(logits_ptr + at, mask=inside, other=0.0)
            if CLIP:
                s = leaky(s)
            if NORM == "l2norm":
                s = s * s
            else:
                s = tl.abs(s)
            total += tl.sum(s.reshape(SETS, BLOCK_Q, BLOCK_X), 1)
    if NORM == "softmax":
        total = m + tl.log(total)
    elif NORM == "l2norm":
        total = tl.sqrt(total)
    if INVERSE and NORM != "softmax":
        total = 1 / (total + EPS)
    c = group * SETS + tl.arange(0, SETS)
    out = out_ptr + c.to(tl.int64)[:, None] * (ld16 * 16) + x[None, :]
    tl.store(out, total, mask=(c < sets)[:, None] & (x < contexts)[None, :])


@triton.jit
def _affinities(
    logits, norms, length, x, size, scale, NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr
):
    """A and the logits scale * A' of a tile; context rows beyond the set have A = 0 and logit -inf."""
    inside = (x < size)[None, :]
    s = tl.load(logits + x[None, :], mask=inside, other=0.0)
    norm = 0.0
    if NORM == "cosine":
        norm = length[:, None] * tl.load(norms + x, mask=x < size, other=0.0)[None, :]
    elif NORM != "none":
        norm = tl.load(norms + x[None, :], mask=inside, other=0.0)
    return s, tl.where(inside, scale * normalised(s, norm, NORM, CLIP, INVERSE), NEVER)


@triton.jit
def _weights(logits, norms, length, x, size, scale, m, NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr):
    """e = exp(logit - m) of a tile, where m is the maximum over the whole set."""
    _, a = _affinities(logits, norms, length, x, size, scale, NORM, CLIP, INVERSE)
    return tl.exp(a - m[:, None])


@triton.jit
def _gram_tile(gram, x, y, size, ld):
    """G[x, y] of one set, 0 beyond its end."""
    inside = (x < size)[:, None] & (y < size)[None, :]
    return tl.load(gram + x[:, None] * ld + y[None, :], mask=inside, other=0.0)


@triton.jit
def _context_tile(context, x, d, size, D: tl.constexpr):
    """Columns d of context rows x in float32, 0 beyond the set."""
    inside = (x < size)[:, None] & (d < D)[None, :]
    return tl.load(context + x[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _poor(square, z, largest, real):
    """Where z^2 |P|^2 (`square`) is dominated by cancellation error: below a share CANCELLED of its terms too few of
    float32's digits are left. `largest` is max |x|^2 of the set."""
    return (square < CANCELLED * largest * z * z) & real


@triton.jit
def _attend_tile(
    logits, norms, length, gram, ld, context, x, size, real, scale, NORM: tl.constexpr, CLIP: tl.constexpr,
    INVERSE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For a set that fits one tile: e and G e [BLOCK_Q, BLOCK_X], z, z t and z^2 |P|^2, where alpha = e / z.

    Where the Gram form of |P|^2 cancels, |P|^2 is computed again from P itself.
    """
    s, a = _affinities(logits, norms, length, x, size, scale, NORM, CLIP, INVERSE)
    e = tl.exp(a - tl.max(a, 1)[:, None])
    z = tl.sum(e, 1)
    product = tl.dot(e, _gram_tile(gram, x, x, size, ld), input_precision=PRECISION)
    square = tl.sum(e * product, 1)
    poor = _poor(square, z, tl.max(tl.load(gram + x * (ld + 1), mask=x < size, other=0.0), 0), real)
    if tl.max(poor[:, None].to(tl.int32)) > 0:
        exact = tl.zeros_like(square)
        for d in range(0, D, BLOCK_D):
            v = _context_tile(context, x, d + tl.arange(0, BLOCK_D), size, D)
            p = tl.dot(e, v, input_precision=PRECISION)
            exact += tl.sum(p * p, 1)
        square = tl.where(poor, exact, square)
    return e, product, z, tl.sum(e * s, 1), square


@triton.jit
def _attend_tiles(
    logits, norms, length, gram, ld, context, x, size, real, alphas, products, scale, MODE: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For a set of several tiles: z, z t and z^2 |P|^2; also stores e, or alpha and G alpha, as MODE needs."""
    m = tl.full((BLOCK_Q,), NEVER, tl.float32)
    z = tl.zeros((BLOCK_Q,), tl.float32)
    dot = tl.zeros((BLOCK_Q,), tl.float32)
    largest = 0.0
    for i in range(0, size, BLOCK_X):
        s, a = _affinities(logits, norms, length, i + x, size, scale, NORM, CLIP, INVERSE)
        larger = tl.maximum(m, tl.max(a, 1))
        shrink, e = tl.exp(m - larger), tl.exp(a - larger[:, None])
        z = z * shrink + tl.sum(e, 1)
        dot = dot * shrink + tl.sum(e * s, 1)
        m = larger
        largest = tl.maximum(largest, tl.max(tl.load(gram + (i + x) * (ld + 1), mask=i + x < size, other=0.0), 0))
    square = tl.zeros((BLOCK_Q,), tl.float32)
    for i in range(0, size, BLOCK_X):
        product = tl.zeros((BLOCK_Q, BLOCK_X), tl.float32)
        for j in range(0, size, BLOCK_X):
            e = _weights(logits, norms, length, j + x, size, scale, m, NORM, CLIP, INVERSE)
            product = tl.dot(e, _gram_tile(gram, j + x, i + x, size, ld), product, input_precision=PRECISION)
        e = _weights(logits, norms, length, i + x, size, scale, m, NORM, CLIP, INVERSE)
        square += tl.sum(e * product, 1)
        if MODE == "backward":
            inside = real[:, None] & (i + x < size)[None, :]
            tl.store(alphas + (i + x)[None, :], e / z[:, None], mask=inside)
            tl.store(products + (i + x)[None, :], product / z[:, None], mask=inside)
    poor = _poor(square, z, largest, real)
    if tl.max(poor[:, None].to(tl.int32)) > 0:
        exact = tl.zeros((BLOCK_Q,), tl.float32)
        for d in range(0, D, BLOCK_D):
            p = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
            for j in range(0, size, BLOCK_X):
                e = _weights(logits, norms, length, j + x, size, scale, m, NORM, CLIP, INVERSE)
                v = _context_tile(context, j + x, d + tl.arange(0, BLOCK_D), size, D)
                p = tl.dot(e, v, p, input_precision=PRECISION)
            exact += tl.sum(p * p, 1)
        square = tl.where(poor, exact, square)
    if MODE == "weights":
        for i in range(0, size, BLOCK_X):
            e = _weights(logits, norms, length, i + x, size, scale, m, NORM, CLIP, INVERSE)
            tl.debug_barrier()  # the affinities have been read
            tl.store(alphas + (i + x)[None, :], e, mask=real[:, None] & (i + x < size)[None, :])
    return z, dot, square


@triton.jit(
    do_not_specialize=[
        "set_first", "sets", "context_first", "query_first", "queries", "owner_first", "ld16", "gram16", "out16",
    ]
)
def _attend(
    logits_ptr, norm_ptr, gram_ptr, context_ptr, start_ptr, size_ptr, owner_ptr, length_ptr,
    alpha_ptr, product_ptr, dot_ptr, out_ptr,
    set_first, sets, context_first, query_first, queries, owner_first, ld16, gram16, out16, scale,
    MODE: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of every query over every set of contexts. `logits_ptr`: A; results [queries, sets] go to `out_ptr`.

    MODE "score": r. "backward": |P|^2, t in `dot_ptr`, and alpha and G alpha, laid out like A. "weights":
    1 / (z (|P| + eps)), and e = z alpha (at most 1) which overwrites A.
    One program: BLOCK_Q packed queries with one set. Grid: blocks of queries x sets.
    """
    INVERSE: tl.constexpr = MODE != "backward"
    tile, b = tl.program_id(0) // sets, tl.program_id(0) % sets
    first = tile * BLOCK_Q
    q = tl.minimum(tl.arange(0, BLOCK_Q), queries - first - 1)
    real = tl.arange(0, BLOCK_Q) < queries - first
    start, size = tl.load(start_ptr + set_first + b), tl.load(size_ptr + set_first + b)
    # 64-bit scalar offsets to the tile, 32-bit offsets within it.
    ld, column = ld16 * 16, start - context_first
    corner, within = first.to(tl.int64) * ld + column, q[:, None] * ld
    owner = tl.load(owner_ptr + query_first + first + q)
    low = tl.min(owner, 0)
    length = 0.0
    if NORM == "cosine":
        norms = norm_ptr + start
        length = tl.load(length_ptr + query_first + first + q)
    else:
        norms = norm_ptr + (low - owner_first).to(tl.int64) * ld + column + (owner - low)[:, None] * ld
    gram = gram_ptr + column.to(tl.int64) * (gram16 * 16)
    context = context_ptr + start.to(tl.int64) * D
    x = tl.arange(0, BLOCK_X)

    if WHOLE or size <= BLOCK_X:
        e, product, z, dot, square = _attend_tile(
            logits_ptr + corner + within, norms, length, gram, gram16 * 16, context, x, size, real, scale,
            NORM, CLIP, INVERSE, D, PRECISION, BLOCK_D,
        )  # fmt: skip
        if MODE != "score":
            tl.debug_barrier()  # the affinities have been read
            inside = real[:, None] & (x < size)[None, :]
            if MODE == "backward":
                tl.store(alpha_ptr + corner + within + x[None, :], e / z[:, None], mask=inside)
                tl.store(product_ptr + corner + within + x[None, :], product / z[:, None], mask=inside)
            else:
                tl.store(alpha_ptr + corner + within + x[None, :], e, mask=inside)
    else:
        z, dot, square = _attend_tiles(
            logits_ptr + corner + within, norms, length, gram, gram16 * 16, context, x, size, real,
            alpha_ptr + corner + within, product_ptr + corner + within, scale,
            MODE, NORM, CLIP, INVERSE, D, PRECISION, BLOCK_Q, BLOCK_X, BLOCK_D,
        )  # fmt: skip

    out = first.to(tl.int64) * (out16 * 16) + b + q * (out16 * 16)
    if MODE == "score":
        both = tl.load(length_ptr + query_first + first + q) * (tl.sqrt(square) / z)
        tl.store(out_ptr + out, dot / z / tl.maximum(both, EPS), mask=real)
    elif MODE == "weights":
        tl.store(out_ptr + out, 1 / (tl.sqrt(square) + EPS * z), mask=real)
    else:
        tl.store(dot_ptr + out, dot / z, mask=real)
        tl.store(out_ptr + out, square / (z * z), mask=real)


# Scratch floats, forward: per query row and context row (an affinity, at worst a norm), and per query row and set.
EACH_ROW, EACH_SET = 2, 1


class Norm(NamedTuple):
    """How affinities become the attention's logits: the kernels' constants of an `affinity_norm`."""

    NORM: str  # softmax, l2norm, l1norm or none, over the queries of a set; or cosine, by both rows' lengths
    CLIP: bool  # whether LeakyReLU is applied first


COSINE = Norm("cosine", False)


def norm_of(affinity_norm: str) -> Norm:
    clip = affinity_norm.startswith("clipped")
    return Norm(affinity_norm.removeprefix("clipped").lstrip("_") or "none", clip)


class Attended(NamedTuple):
    """Results of `attend` for a piece, all float32.

    Attributes:
        logits: [queries, leading(context rows)] affinities A; e in mode "weights".
        norms: [query sets, leading(context rows)]; for cosines all contexts' lengths; unused (logits) without a norm.
        out: [queries, leading(context sets)] r, 1 / (z (|P| + eps)) or |P|^2, by mode.
        alpha, product: alpha and G alpha, shaped like logits; meaningful in mode "backward" only.
        dot: t, shaped like out; meaningful in mode "backward" only.
    """

    logits: Tensor
    norms: Tensor
    out: Tensor
    alpha: Tensor
    product: Tensor
    dot: Tensor


def attend(
    mode: str,
    query: _launch.Sets,
    context: _launch.Sets,
    piece: _launch.Piece,
    gram: Tensor,
    lengths: Tensor | None,
    norm: Norm,
    scale: float,
    context_lengths: Tensor | None = None,
) -> Attended:
    """Compute the affinities of a piece, their norms over the queries, and attention.

    Args:
        mode: as in `_attend`.
        gram: Gram matrices of the piece's context sets.
        lengths: lengths of all queries; needed for mode "score" and for cosines.
        context_lengths: lengths of all context rows; needed for cosines.
    """
    rows, device = query.rows, query.rows.device
    arch = _launch.arch(device)
    queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
    contexts = piece.x.stop - piece.x.start

    def empty(n: int, columns: int) -> Tensor:
        return torch.empty(n, leading(columns), dtype=torch.float32, device=device)

    logits = empty(queries, contexts)
    affinity(rows, context.rows, piece.q, piece.x, logits, _tiles.products(rows.dtype))
    norms = logits if context_lengths is None else context_lengths
    backward = mode == "backward"
    if norm.NORM not in ("none", "cosine"):
        query_sets = piece.queries.stop - piece.queries.start
        norms = empty(query_sets, contexts)
        tile = _tiles.query_norms(rows.dtype, arch)
        grid = _launch.blocks(query_sets, tile["SETS"]) * _launch.blocks(contexts, tile["BLOCK_X"])
        _query_norms[(grid,)](
            logits, query.start, query.size, norms, piece.queries.start, query_sets, piece.q.start, contexts,
            logits.stride(0) // 16, NORM=norm.NORM, CLIP=norm.CLIP, INVERSE=not backward, **tile,
        )  # fmt: skip
    out = empty(queries, sets)
    alpha, product = (torch.empty_like(logits), torch.empty_like(logits)) if backward else (logits, logits)
    dot = torch.empty_like(out) if backward else out
    tile = _tiles.attend(rows.dtype, arch, backward, context.whole, norm == COSINE)
    _attend[(_launch.blocks(queries, tile["BLOCK_Q"]) * sets,)](
        logits, norms, gram, context.rows, context.start, context.size, query.owner,
        out if lengths is None else lengths, alpha, product, dot, out,
        piece.contexts.start, sets, piece.x.start, piece.q.start, queries, piece.queries.start,
        logits.stride(0) // 16, gram.stride(0) // 16, out.stride(0) // 16, scale,
        MODE=mode, NORM=norm.NORM, CLIP=norm.CLIP, WHOLE=context.whole, D=rows.shape[1],
        PRECISION=_tiles.exact(rows.dtype), BLOCK_X=context.tile, **tile,
    )  # fmt: skip
    return Attended(logits, norms, out, alpha, product, dot)


def grams(context: _launch.Sets, piece: _launch.Piece) -> Tensor:
    """Gram matrices of a piece's sets of contexts, [their rows, leading(longest)] float32."""
    rows = piece.x.stop - piece.x.start
    out = torch.empty(rows, leading(context.longest), dtype=torch.float32, device=context.rows.device)
    gram(context, piece.contexts.start, piece.contexts.stop, out)
    return out


def with_grams(context: _launch.Sets, pieces: Iterable[_launch.Piece]) -> Iterator[tuple[_launch.Piece, Tensor]]:
    """Every piece with its contexts' Gram matrices, computed once for consecutive pieces that share contexts."""
    done = None
    for piece in pieces:
        if done != piece.contexts:
            gram, done = grams(context, piece), piece.contexts
        yield piece, gram


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    norms = [norm_of(n) for n in ("softmax", "l1norm", "clipped_l2norm", "clipped", "none")]
    types = "*fp32 *i32 *i32 *fp32 i32 i32 i32 i32 i32"
    for norm in norms[:3]:
        for inverse in (True, False):
            constants = dict(norm._asdict(), INVERSE=inverse)
            yield _tiles.Compilation(_query_norms, types, constants, _tiles.query_norms(torch.float32, arch))
    # (dtype, mode, norm, whole, rows of a tile of contexts)
    single, half, brain = _tiles.NAMES
    clipped = norms[2]
    wide, narrow = _launch.REGIONS, _launch.WORDS
    ways = [(dtype, "score", clipped, True, wide) for dtype in _tiles.NAMES]
    ways += [(half, "score", norm, True, wide) for norm in norms if norm != clipped]
    ways += [(dtype, mode, clipped, True, wide) for dtype in (single, half) for mode in ("weights", "backward")]
    ways += [(single, mode, clipped, False, x) for mode in ("score", "weights", "backward") for x in (wide, narrow)]
    ways += [(half, "score", clipped, False, narrow)]
    ways += [(dtype, mode, COSINE, False, narrow) for dtype in _tiles.NAMES for mode in ("score", "backward")]
    for dtype, mode, norm, whole, rows in ways:
        types = f"*fp32 *fp32 *fp32 *{_tiles.NAMES[dtype]} *i32 *i32 *i32" + " *fp32" * 5 + " i32" * 9 + " fp32"
        constants = dict(norm._asdict(), MODE=mode, WHOLE=whole, D=1024, PRECISION=_tiles.exact(dtype), BLOCK_X=rows)
        tile = _tiles.attend(dtype, arch, mode == "backward", whole, norm == COSINE)
        yield _tiles.Compilation(_attend, types, constants, tile)
