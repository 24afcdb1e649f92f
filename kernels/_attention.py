"""Attention of packed queries over sets of contexts: `ops/_attention.py`, and (1) to (3) of `cross_attention_score`.

    alpha[q, x] = softmax over the rows x of set b, or those of them that are kept, of scale * A'[q, x]
    t[q, b]     = alpha_q . A_q,    |P|^2 [q, b] = alpha_q^T G_b alpha_q
    r[q, b]     = t / max(|q| |P|, 1e-8), or t

A' are the affinities A after `_norms`, and G_b is the Gram matrix of set b. A [queries, context rows] is a workspace.
`_attend` tiles the packed queries without regard to their sets, so its tiles are full in that direction; 36 regions
fill 56 % of a tile's 64 context rows.

Which contexts are kept is decided from e = exp(logit - largest) or from the logits. Ties have to fall as in the
reference, and in every pass over a set in the same way. So a product and a sum are then rounded each, not fused, and
the largest e is exactly 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._affinity import affinity, gram, leading
from ._norms import COSINE, Norm, norm_of, query_norms
from ._pair_rows import PairRows, context_products
from ._tl import CANCELLED, EPS, NEVER, average, cut_of, denominator, kept, norms_of, scale_of, scaled


@triton.jit
def _weights(
    logits, norms, length, x, size, scale, bound, m, cut, WEIGHTS: tl.constexpr, NORM: tl.constexpr,
    CLIP: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """`kept` of a tile."""
    _, a = scaled(logits, norms, length, x, size, scale, NORM, CLIP, INVERSE)
    return kept(a, m, cut, bound, WEIGHTS)


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
    return (square < largest * CANCELLED * z * z) & real


@triton.jit
def _attend_tile(
    logits, norms, length, gram, ld, context, x, size, real, scale, bound, WEIGHTS: tl.constexpr, GRAM: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For a set that fits one tile: e and G e [BLOCK_Q, BLOCK_X], z, z t and z^2 |P|^2, where alpha = e / z.

    Where the Gram form of |P|^2 cancels, |P|^2 is computed again from P itself. Without GRAM there is no G e nor |P|^2.
    """
    s, a = scaled(logits, norms, length, x, size, scale, NORM, CLIP, INVERSE)
    m = tl.max(a, 1)
    cut = m
    if WEIGHTS == "focal_equal" or WEIGHTS == "focal_prob":
        above, below = average(tl.exp(a - m[:, None]), (x < size)[None, :], WEIGHTS)
        cut = cut_of(above, below)
    e = kept(a, m, cut, bound, WEIGHTS)
    z = denominator(tl.sum(e, 1), WEIGHTS)
    product, square = e, z
    if GRAM:
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
def _kept_sums(
    logits, norms, length, x, size, scale, bound, m, WEIGHTS: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """The cut, z and z t of a set of several tiles, of which only some contexts are kept."""
    cut = m
    if WEIGHTS == "focal_equal" or WEIGHTS == "focal_prob":
        above, below = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
        for i in range(0, size, BLOCK_X):
            _, a = scaled(logits, norms, length, i + x, size, scale, NORM, CLIP, INVERSE)
            more, less = average(tl.exp(a - m[:, None]), (i + x < size)[None, :], WEIGHTS)
            above += more
            below += less
        cut = cut_of(above, below)
    z, dot = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    for i in range(0, size, BLOCK_X):
        s, a = scaled(logits, norms, length, i + x, size, scale, NORM, CLIP, INVERSE)
        e = kept(a, m, cut, bound, WEIGHTS)
        z += tl.sum(e, 1)
        dot += tl.sum(e * s, 1)
    return cut, denominator(z, WEIGHTS), dot


@triton.jit
def _attend_tiles(
    logits, norms, length, gram, ld, context, x, size, real, alphas, products, scale, bound, MODE: tl.constexpr,
    WEIGHTS: tl.constexpr, GRAM: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, INVERSE: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For a set of several tiles: z, z t and z^2 |P|^2; also stores e, or alpha and G alpha, as MODE needs."""
    m = tl.full((BLOCK_Q,), NEVER, tl.float32)
    z = tl.zeros((BLOCK_Q,), tl.float32)
    dot = tl.zeros((BLOCK_Q,), tl.float32)
    largest = 0.0
    for i in range(0, size, BLOCK_X):
        s, a = scaled(logits, norms, length, i + x, size, scale, NORM, CLIP, INVERSE)
        larger = tl.maximum(m, tl.max(a, 1))
        shrink, e = tl.exp(m - larger), tl.exp(a - larger[:, None])
        z = z * shrink + tl.sum(e, 1)
        dot = dot * shrink + tl.sum(e * s, 1)
        m = larger
        if GRAM:
            largest = tl.maximum(largest, tl.max(tl.load(gram + (i + x) * (ld + 1), mask=i + x < size, other=0.0), 0))
    cut = m
    if WEIGHTS != "softmax":
        cut, z, dot = _kept_sums(
            logits, norms, length, x, size, scale, bound, m, WEIGHTS, NORM, CLIP, INVERSE, BLOCK_Q, BLOCK_X
        )
    square = tl.zeros((BLOCK_Q,), tl.float32)
    for i in range(0, size if GRAM or MODE == "backward" else 0, BLOCK_X):
        if GRAM:
            product = tl.zeros((BLOCK_Q, BLOCK_X), tl.float32)
            for j in range(0, size, BLOCK_X):
                e = _weights(logits, norms, length, j + x, size, scale, bound, m, cut, WEIGHTS, NORM, CLIP, INVERSE)
                product = tl.dot(e, _gram_tile(gram, j + x, i + x, size, ld), product, input_precision=PRECISION)
        e = _weights(logits, norms, length, i + x, size, scale, bound, m, cut, WEIGHTS, NORM, CLIP, INVERSE)
        inside = real[:, None] & (i + x < size)[None, :]
        if GRAM:
            square += tl.sum(e * product, 1)
        if MODE == "backward":
            tl.store(alphas + (i + x)[None, :], e / z[:, None], mask=inside)
            if GRAM:
                tl.store(products + (i + x)[None, :], product / z[:, None], mask=inside)
    if GRAM:
        poor = _poor(square, z, largest, real)
        if tl.max(poor[:, None].to(tl.int32)) > 0:
            exact = tl.zeros((BLOCK_Q,), tl.float32)
            for d in range(0, D, BLOCK_D):
                p = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
                for j in range(0, size, BLOCK_X):
                    e = _weights(logits, norms, length, j + x, size, scale, bound, m, cut, WEIGHTS, NORM, CLIP, INVERSE)
                    v = _context_tile(context, j + x, d + tl.arange(0, BLOCK_D), size, D)
                    p = tl.dot(e, v, p, input_precision=PRECISION)
                exact += tl.sum(p * p, 1)
            square = tl.where(poor, exact, square)
    if MODE == "weights":
        for i in range(0, size, BLOCK_X):
            e = _weights(logits, norms, length, i + x, size, scale, bound, m, cut, WEIGHTS, NORM, CLIP, INVERSE)
            tl.debug_barrier()  # the affinities have been read
            tl.store(alphas + (i + x)[None, :], e, mask=real[:, None] & (i + x < size)[None, :])
    return z, dot, square


@triton.jit(
    do_not_specialize=[
        "set_first", "sets", "context_first", "query_first", "queries", "owner_first", "part", "ld16", "gram16",
        "out16",
    ]
)
def _attend(
    logits_ptr, norm_ptr, gram_ptr, context_ptr, start_ptr, size_ptr, owner_ptr, length_ptr,
    alpha_ptr, product_ptr, dot_ptr, out_ptr, scale_ptr, place_ptr,
    set_first, sets, context_first, query_first, queries, owner_first, part, ld16, gram16, out16,
    scale, bound, SCALE: tl.constexpr, MODE: tl.constexpr, WEIGHTS: tl.constexpr, GRAM: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of every query over every set of contexts. `logits_ptr`: A; results [queries, sets] go to `out_ptr`.

    MODE "score": r. "backward": |P|^2, t in `dot_ptr`, and alpha and G alpha, laid out like A. "weights":
    1 / (z (|P| + eps)), and e = z alpha (at most 1) which overwrites A. Without GRAM r = t, and 1 / z takes the place
    of 1 / (z (|P| + eps)); there is no |P|^2 nor G alpha. `bound`: what logits exceed with WEIGHTS "threshold".
    SCALE: as in `scale_of`.
    One program: BLOCK_Q packed queries with one set. Grid: blocks of queries x sets.
    """
    INVERSE: tl.constexpr = MODE != "backward" and WEIGHTS == "softmax"  # others: the same logits in both passes
    tile, b = tl.program_id(0) // sets, tl.program_id(0) % sets
    first = tile * BLOCK_Q
    q = tl.minimum(tl.arange(0, BLOCK_Q), queries - first - 1)
    real = tl.arange(0, BLOCK_Q) < queries - first
    start, size = tl.load(start_ptr + set_first + b), tl.load(size_ptr + set_first + b)
    # 64-bit scalar offsets to the tile, 32-bit offsets within it.
    ld, column = ld16 * 16, start - context_first
    corner, within = first.to(tl.int64) * ld + column, q[:, None] * ld
    row = query_first + first + q
    scale = scale_of(scale_ptr, scale, place_ptr, row, set_first + b, part, SCALE)
    length = 0.0
    if NORM == "cosine":
        norms = norm_ptr + start
        length = tl.load(length_ptr + row)
    else:
        norms = norms_of(norm_ptr, owner_ptr, row, owner_first, ld, column)
    gram = gram_ptr + column.to(tl.int64) * (gram16 * 16)
    context = context_ptr + start.to(tl.int64) * D
    x = tl.arange(0, BLOCK_X)

    if WHOLE or size <= BLOCK_X:
        e, product, z, dot, square = _attend_tile(
            logits_ptr + corner + within, norms, length, gram, gram16 * 16, context, x, size, real, scale,
            bound, WEIGHTS, GRAM, NORM, CLIP, INVERSE, D, PRECISION, BLOCK_D,
        )  # fmt: skip
        if MODE != "score":
            tl.debug_barrier()  # the affinities have been read
            inside = real[:, None] & (x < size)[None, :]
            if MODE == "backward":
                tl.store(alpha_ptr + corner + within + x[None, :], e / z[:, None], mask=inside)
                if GRAM:
                    tl.store(product_ptr + corner + within + x[None, :], product / z[:, None], mask=inside)
            else:
                tl.store(alpha_ptr + corner + within + x[None, :], e, mask=inside)
    else:
        z, dot, square = _attend_tiles(
            logits_ptr + corner + within, norms, length, gram, gram16 * 16, context, x, size, real,
            alpha_ptr + corner + within, product_ptr + corner + within, scale, bound,
            MODE, WEIGHTS, GRAM, NORM, CLIP, INVERSE, D, PRECISION, BLOCK_Q, BLOCK_X, BLOCK_D,
        )  # fmt: skip

    out = first.to(tl.int64) * (out16 * 16) + b + q * (out16 * 16)
    if MODE == "score":
        r = dot / z
        if GRAM:
            r = r / tl.maximum(tl.load(length_ptr + row) * (tl.sqrt(square) / z), EPS)
        tl.store(out_ptr + out, r, mask=real)
    elif MODE == "weights":
        length = z
        if GRAM:
            length = tl.sqrt(square) + z * EPS
        tl.store(out_ptr + out, 1 / length, mask=real)
    else:
        tl.store(dot_ptr + out, dot / z, mask=real)
        if GRAM:
            tl.store(out_ptr + out, square / (z * z), mask=real)


# Scratch floats, forward: per query row and context row (an affinity, at worst a norm), and per query row and set.
EACH_ROW, EACH_SET = 2, 1


class Attended(NamedTuple):
    """Results of `attend` for a piece, all float32.

    Attributes:
        logits: [queries, leading(context rows)] affinities A; e in mode "weights".
        norms: [query sets, leading(context rows)]; for cosines all contexts' lengths; unused (logits) without a norm.
        out: [queries, leading(context sets)] r, 1 / (z (|P| + eps)), 1 / z or |P|^2: see `_attend`.
        alpha, product: alpha and G alpha, shaped like logits; meaningful in mode "backward" only.
        dot: t, shaped like out; meaningful in mode "backward" only.
        gram: whether there is |P|^2, and G alpha in mode "backward".
    """

    logits: Tensor
    norms: Tensor
    out: Tensor
    alpha: Tensor
    product: Tensor
    dot: Tensor
    gram: bool


def attend(
    mode: str,
    query: _launch.Sets,
    context: _launch.Sets,
    piece: _launch.Piece,
    gram: Tensor | None,
    lengths: Tensor | None,
    norm: Norm,
    scale: float,
    context_lengths: Tensor | None = None,
    weights: str = "softmax",
    bound: float = 0.0,
    own: PairRows | None = None,
    scales: PairRows | None = None,
) -> Attended:
    """Compute the affinities of a piece, their norms over the queries, and attention.

    Args:
        mode: as in `_attend`.
        gram: Gram matrices of the piece's context sets; None where |P| is not needed.
        lengths: lengths of all queries; needed for mode "score" with Gram matrices, and for cosines.
        context_lengths: lengths of all context rows; needed for cosines.
        weights: which contexts are kept, as in `ops/_attention.py`.
        bound: scale * threshold.
        own: queries of each pair's own, in place of the rows of `query`.
        scales: in place of `scale`, a number in memory (part 0) or one for each query and set.
    """
    rows, device, arch = query.rows, query.rows.device, _launch.arch(query.rows.device)
    queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
    contexts = piece.x.stop - piece.x.start

    def empty(n: int, columns: int) -> Tensor:
        return torch.empty(n, leading(columns), dtype=torch.float32, device=device)

    logits = empty(queries, contexts)
    if own is None:
        affinity(rows, context.rows, piece.q, piece.x, logits, _tiles.products(rows.dtype))
    else:
        context_products(context, piece, own, logits)
    norms = logits if context_lengths is None else context_lengths
    backward = mode == "backward"
    if norm.NORM not in ("none", "cosine"):
        norms = query_norms(query, piece, logits, norm, inverse=not backward and weights == "softmax")
    out = empty(queries, sets)
    alpha = torch.empty_like(logits) if backward else logits
    product = torch.empty_like(logits) if backward and gram is not None else alpha
    dot = torch.empty_like(out) if backward else out
    how = "argument" if scales is None else "pairs" if scales.part else "number"
    temperatures, place, part = (out, query.owner, 0) if scales is None else scales
    tile = _tiles.attend(rows.dtype, arch, backward, context.whole, norm.NORM == "cosine", weights == "softmax")
    _attend[(_launch.blocks(queries, tile["BLOCK_Q"]) * sets,)](
        logits, norms, logits if gram is None else gram, context.rows, context.start, context.size, query.owner,
        out if lengths is None else lengths, alpha, product, dot, out, temperatures, place,
        piece.contexts.start, sets, piece.x.start, piece.q.start, queries, piece.queries.start, part,
        logits.stride(0) // 16, 0 if gram is None else gram.stride(0) // 16, out.stride(0) // 16, scale, bound,
        SCALE=how, MODE=mode, WEIGHTS=weights, GRAM=gram is not None, NORM=norm.NORM, CLIP=norm.CLIP,
        WHOLE=context.whole, D=rows.shape[1], PRECISION=_tiles.exact(rows.dtype), BLOCK_X=context.tile, **tile,
    )  # fmt: skip
    return Attended(logits, norms, out, alpha, product, dot, gram is not None)


def grams(context: _launch.Sets, piece: _launch.Piece) -> Tensor:
    """Gram matrices of a piece's sets of contexts, [their rows, leading(longest)] float32."""
    rows = piece.x.stop - piece.x.start
    out = torch.empty(rows, leading(context.longest), dtype=torch.float32, device=context.rows.device)
    gram(context, piece.contexts.start, piece.contexts.stop, out)
    return out


def with_grams(
    context: _launch.Sets, pieces: Iterable[_launch.Piece], needed: bool = True
) -> Iterator[tuple[_launch.Piece, Any]]:
    """Every piece with its contexts' Gram matrices (None if not `needed`), computed once for those in a row."""
    done, gram = None, None
    for piece in pieces:
        if needed and done != piece.contexts:
            gram, done = grams(context, piece), piece.contexts
        yield piece, gram


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    norms = [norm_of(n) for n in ("softmax", "l1norm", "clipped_l2norm", "clipped", "none")]
    # (dtype, mode, norm, whole, rows of a tile of contexts)
    (single, half, _), clipped = _tiles.NAMES, norms[2]
    wide, narrow = _launch.REGIONS, _launch.WORDS
    ways = [(dtype, "score", clipped, True, wide) for dtype in _tiles.NAMES]
    ways += [(half, "score", norm, True, wide) for norm in norms if norm != clipped]
    ways += [(dtype, mode, clipped, True, wide) for dtype in (single, half) for mode in ("weights", "backward")]
    ways += [(single, mode, clipped, False, x) for mode in ("score", "weights", "backward") for x in (wide, narrow)]
    ways += [(half, "score", clipped, False, narrow)]
    ways += [(dtype, mode, COSINE, False, narrow) for dtype in _tiles.NAMES for mode in ("score", "backward")]
    rules = [(*way, "softmax", True) for way in ways]
    # BFAN; NAAF's three terms, the first of which is CHAN's and MaxSim's
    for weights, norm, lengths in (
        ("focal_equal", clipped, True), ("focal_prob", clipped, True), ("hard", norms[4], False),
        ("threshold", norms[4], True), ("softmax", clipped, False),
    ):  # fmt: skip
        for whole, x in ((True, wide), (False, narrow)):
            rules += [(single, mode, norm, whole, x, weights, lengths) for mode in ("score", "backward")]
    # `attended_vectors`: one scale, or one for each pair
    scaled_by = [(*rule, "argument") for rule in rules]
    for dtype, how, mode in itertools.product((single, half), ("pairs", "number"), ("weights", "backward")):
        for whole, x in ((True, wide), (False, narrow)):
            scaled_by.append((dtype, mode, clipped, whole, x, "softmax", False, how))
    for dtype, mode, norm, whole, x, weights, lengths, how in scaled_by:
        t = _tiles.NAMES[dtype]
        scale = "*fp32 *i32" if how == "argument" else f"*{t} *i64"
        types = f"*fp32 *fp32 *fp32 *{t} *i32 *i32 *i32" + " *fp32" * 5 + f" {scale}" + " i32" * 10 + " fp32 fp32"
        constants = dict(norm._asdict(), SCALE=how, MODE=mode, WEIGHTS=weights, GRAM=lengths, WHOLE=whole, D=1024)
        constants |= dict(PRECISION=_tiles.exact(dtype), BLOCK_X=x)
        tile = _tiles.attend(dtype, arch, mode == "backward", whole, norm == COSINE, weights == "softmax")
        yield _tiles.Compilation(_attend, types, constants, tile)
