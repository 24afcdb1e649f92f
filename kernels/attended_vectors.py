"""`attended_vectors`: equations (1) to (6) of `ops/attended_vectors.py`.

For each piece of all pairs, `_attention` computes alpha, with queries and scales of each pair's own where there are
any, and `_pair_rows` the sums over contexts. Queries are words and contexts are regions (t2i), or the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from itm_fast._workspace import scratch_bytes

from . import _attention, _launch, _tiles
from ._attention import Attended
from ._attention_backward import EACH_ROW, EACH_SET, Gradients, coefficients, logit_gradient
from ._norms import Norm, norm_of
from ._pair_rows import PairRows, combine, context_products, pair_rows, weighted_sum
from ._tl import norms_of, scale_of, scaled

OP = "attended_vectors"


@triton.jit(
    do_not_specialize=[
        "set_first", "sets", "context_first", "query_first", "queries", "owner_first", "part", "ld16", "in16",
    ]
)
def _through_scale(
    logits_ptr, norm_ptr, alpha_ptr, f_ptr, w0_ptr, w1_ptr, dc_ptr, scale_ptr, place_ptr, start_ptr, size_ptr,
    owner_ptr, set_first, sets, context_first, query_first, queries, owner_first, part, ld16, in16,
    SCALE: tl.constexpr, NEEDED: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_X: tl.constexpr,
):  # fmt: skip
    """d c = sum_x alpha_x (F_x - w0) A'_x if NEEDED, w1 = c and w0 *= c, all [queries, sets]; w0 is sum_x alpha_x F_x.

    One program: BLOCK_Q queries with one set of contexts. Grid: blocks of queries x sets.
    """
    tile, b = tl.program_id(0) // sets, tl.program_id(0) % sets
    first = tile * BLOCK_Q
    q = tl.minimum(tl.arange(0, BLOCK_Q), queries - first - 1)
    real = tl.arange(0, BLOCK_Q) < queries - first
    start, size = tl.load(start_ptr + set_first + b), tl.load(size_ptr + set_first + b)
    ld, column = ld16 * 16, start - context_first
    within = first.to(tl.int64) * ld + column + q[:, None] * ld
    row = query_first + first + q
    at_b = first.to(tl.int64) * (in16 * 16) + b + q * (in16 * 16)
    c = scale_of(scale_ptr, 0.0, place_ptr, row, set_first + b, part, SCALE)
    w0 = tl.load(w0_ptr + at_b)
    if NEEDED:
        norms = norms_of(norm_ptr, owner_ptr, row, owner_first, ld, column)
        dc = tl.zeros((BLOCK_Q,), tl.float32)
        for j in range(0, size, BLOCK_X):
            x = j + tl.arange(0, BLOCK_X)
            inside = (x < size)[None, :]
            _, a = scaled(logits_ptr + within, norms, 0.0, x, size, 1.0, NORM, CLIP, False)
            alpha = tl.load(alpha_ptr + within + x[None, :], mask=inside, other=0.0)
            f = tl.load(f_ptr + within + x[None, :], mask=inside, other=0.0)
            dc += tl.sum(tl.where(inside, alpha * (f - w0[:, None]) * a, 0.0), 1)
        tl.store(dc_ptr + at_b, dc, mask=real)
    c = tl.reshape(c + tl.zeros((BLOCK_Q, 1), tl.float32), (BLOCK_Q,))
    tl.debug_barrier()  # w0 has been read
    tl.store(w0_ptr + at_b, w0 * c, mask=real)
    tl.store(w1_ptr + at_b, c, mask=real)


class _Call:
    """The sets of a call, and what its pairs have of their own.

    Attributes:
        query, context: the sets; query has the rows of shared queries, context those that are attended to.
        values: context with the rows that alpha sums.
        own: queries of each pair's own, or None.
        scales: of each pair or, with part 0, one number.
    """

    def __init__(
        self, image: Tensor, words: Tensor, queries: Tensor, values: Tensor, scale: Tensor, cu_seqlens: Tensor,
        region_lengths: Tensor | None, direction: str,
    ) -> None:  # fmt: skip
        self.sizes = len(image), len(cu_seqlens) - 1, image.shape[1], direction
        t2i = direction == "t2i"
        query, self.context = _launch.sets(OP, image, words, cu_seqlens, region_lengths, direction)
        self.values = self.context._replace(rows=_launch.aligned(values))
        shared = queries.shape[0] == 1 if t2i else queries.shape[1] == image.shape[1]
        queries = _launch.aligned(queries)
        self.own = None if shared else self.placed(queries)
        self.query = query._replace(rows=queries.view(-1, queries.shape[2])) if shared else query
        self.scales = self.placed(_launch.aligned(scale))
        if scale.shape == (1, 1):
            self.scales = self.scales._replace(part=0)
        self.limit = scratch_bytes(image.device)

    def placed(self, rows: Tensor) -> PairRows:
        return pair_rows(rows, *self.sizes)

    def pieces(self, each_row: int, each_set: int) -> Iterator[_launch.Piece]:
        return _launch.pieces(self.query, self.context, each_row, each_set, self.limit, _tiles.PIECE)

    def attend(self, mode: str, piece: _launch.Piece, norm: Norm) -> Attended:
        return _attention.attend(
            mode, self.query, self.context, piece, None, None, norm, 1.0, own=self.own, scales=self.scales
        )


def forward(
    image: Tensor,
    words: Tensor,
    queries: Tensor,
    values: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
) -> Tensor:
    """Attended vectors: [I, N, S] for t2i, [I, T, R, S] for i2t."""
    (I, R, _), N, T, S = image.shape, len(words), len(cu_seqlens) - 1, values.shape[1]
    result = image.new_empty((I, N, S) if direction == "t2i" else (I, T, R, S))
    with _launch.on(image.device):
        call = _Call(image, words, queries, values, scale, cu_seqlens, region_lengths, direction)
        norm, out = norm_of(affinity_norm), call.placed(result)
        for piece in call.pieces(_attention.EACH_ROW, _attention.EACH_SET):
            attended = call.attend("weights", piece, norm)
            combine(call.query, call.values, piece, attended.logits, attended.out, out)
    return result


def backward(
    grad: Tensor,
    needs: list[bool],
    image: Tensor,
    words: Tensor,
    queries: Tensor,
    values: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
) -> list[Tensor]:
    """Gradients of image, words, queries, values and scale, those that `needs` marks; own queries' in their dtype, the
    others float32."""
    t2i = direction == "t2i"
    with _launch.on(image.device):
        image = _launch.zero_padding(image, region_lengths)
        if not t2i and region_lengths is not None:
            grad, queries = (_zero_rows(x, region_lengths, image.shape[1]) for x in (grad, queries))
        call = _Call(image, words, queries, values, scale, cu_seqlens, region_lengths, direction)
        query, context, own = call.query, call.context, call.own
        norm, upstream = norm_of(affinity_norm), call.placed(_launch.aligned(grad))
        sums = Gradients(query, context, (needs[2] and own is None, needs[0] if t2i else needs[1]))
        d_values = torch.zeros_like(values, dtype=torch.float32) if needs[3] else None
        d_queries = call.placed(torch.zeros_like(own.rows)) if needs[2] and own is not None else None
        d_scale = torch.zeros_like(scale, dtype=torch.float32) if needs[4] else None
        # d A times the contexts in float32, as half precision has no room for small gradients.
        whole = context if d_queries is None else context._replace(rows=context.rows.float())
        through = d_queries is not None or sums.query is not None or sums.context is not None
        for piece in call.pieces(EACH_ROW, EACH_SET):
            attended = call.attend("backward", piece, norm)
            if d_values is not None:
                weighted_sum(call.values, piece, attended.alpha, None, upstream, d_values)
            if d_scale is None and not through:
                continue
            w, f = coefficients(attended.out, 3), torch.empty_like(attended.alpha)
            context_products(call.values, piece, upstream, f, attended, w[:1])
            _scale_gradient(call, piece, attended, f, w, norm, d_scale)
            if not through:
                continue
            d_affinity = logit_gradient(query, context, piece, attended, f, w, norm, 1.0)
            if own is None:
                sums.add(piece, d_affinity)
                continue
            if d_queries is not None:
                combine(query, whole, piece, d_affinity, None, d_queries)
            if sums.context is not None:
                weighted_sum(context, piece, d_affinity, None, own, sums.context)
        d_context = None if sums.context is None else sums.context.view(image.shape if t2i else words.shape)
        d_other = torch.zeros_like(words if t2i else image, dtype=torch.float32) if needs[1 if t2i else 0] else None
        d_own = None if d_queries is None else d_queries.rows
        d_queries_ = d_own if sums.query is None else sums.query.view(queries.shape)
        d_inputs = (d_context, d_other) if t2i else (d_other, d_context)
        return [d for d in (*d_inputs, d_queries_, d_values, d_scale) if d is not None]


def _zero_rows(rows: Tensor, region_lengths: Tensor, regions: int) -> Tensor:
    """Rows [I, R or T * R, D] or [I, T, R, D] of regions with those of padding set to zero."""
    apart = rows.reshape(len(rows), -1, regions, rows.shape[-1])
    beyond = torch.arange(regions, device=rows.device) >= region_lengths[:, None]
    return apart.masked_fill(beyond[:, None, :, None], 0.0).view(rows.shape)


def _scale_gradient(
    call: _Call, piece: _launch.Piece, attended: Attended, f: Tensor, w: tuple[Tensor, ...], norm: Norm,
    d_scale: Tensor | None,
) -> None:  # fmt: skip
    """Scale w0, write w1, use w2 as scratch; and add the piece's part of d c to d_scale."""
    query, context, scales = call.query, call.context, call.scales
    queries, sets = piece.q.stop - piece.q.start, piece.contexts.stop - piece.contexts.start
    tile = _tiles.through_scale(query.rows.dtype, _launch.arch(f.device))
    _through_scale[(_launch.blocks(queries, tile["BLOCK_Q"]) * sets,)](
        attended.logits, attended.norms, attended.alpha, f, *w, scales.rows, scales.place, context.start, context.size,
        query.owner, piece.contexts.start, sets, piece.x.start, piece.q.start, queries, piece.queries.start,
        scales.part, f.stride(0) // 16, w[0].stride(0) // 16, SCALE="pairs" if scales.part else "number",
        NEEDED=d_scale is not None, NORM=norm.NORM, CLIP=norm.CLIP, BLOCK_X=context.tile, **tile,
    )  # fmt: skip
    if d_scale is None:
        return
    found, (I, T, R, direction) = w[2][:, :sets], call.sizes
    if not scales.part:
        d_scale += found.sum()
    elif direction == "t2i":
        d_scale[piece.contexts, piece.q] = found.t()
    else:
        d_scale.view(I, T, R)[piece.queries, piece.contexts] = found.unflatten(0, (-1, R)).transpose(1, 2)


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for dtype, t in ((torch.float32, "fp32"), (torch.float16, "fp16")):
        types = "*fp32 " * 7 + f"*{t} *i64 *i32 *i32 *i32" + " i32" * 9
        for name, how, rows in (("clipped_l2norm", "pairs", 64), ("softmax", "number", 32), ("none", "pairs", 32)):
            constants = dict(norm_of(name)._asdict(), SCALE=how, NEEDED=name != "none", BLOCK_X=rows)
            yield _tiles.Compilation(_through_scale, types, constants, _tiles.through_scale(dtype, arch))
