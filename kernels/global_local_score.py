"""`global_local_score` in Triton: equations in `ops/global_local_score.py`.

Each vector is a set of one query; the contexts are the captions' words. The products s come from `_affinity`; the
score is r of `_attention`, by (4) and with the norm "cosine". Backward: (5) by `_pooling`, (6) and (7) by
`_product_gradient`, (8) and (9) by `_attention_backward`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from itm_fast._workspace import scratch_bytes
from itm_fast.packing import bounds

from . import _attention, _launch, _tiles
from ._affinity import lengths
from ._attention import Attended
from ._attention_backward import Gradients, gram_gradient, tile_gradient
from ._norms import COSINE
from ._pooling import pool_backward
from ._tl import EPS

OP = "global_local_score"
# Scratch floats per vector and word (forward s; backward also alpha and G alpha), and per vector and caption (forward
# the score; backward g . t*, |t*|^2, w0, w1, w2 and wq).
FORWARD, BACKWARD = (1, 1), (3, 6)
TINY = 1e-30  # least length that is divided by: rows of length 0 have a gradient of 0 there, and 0 / TINY is 0


@triton.jit(do_not_specialize=["query_first", "queries", "context_first", "contexts", "b_first", "ld16", "in16"])
def _product_gradient(
    logit_ptr, alpha_ptr, product_ptr, w0_ptr, w1_ptr, w2_ptr, length_ptr, context_length_ptr, owner_ptr,
    query_first, queries, context_first, contexts, b_first, ld16, in16, scale,
    BLOCK_Q: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """(6) and (7): d s overwrites G alpha (`product_ptr`), and d c c, for d |g| and d n, overwrites s (`logit_ptr`).

    These and alpha: [vectors, words]; w0, w1, w2 [vectors, captions]. d c c is 0 where the lengths are clamped.
    One program: BLOCK_Q vectors with BLOCK_X words. Grid: blocks of vectors x blocks of words.
    """
    chunks = tl.cdiv(contexts, BLOCK_X)
    q = tl.program_id(0) // chunks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    x = tl.program_id(0) % chunks * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = (q < queries)[:, None] & (x < contexts)[None, :]
    b = tl.load(owner_ptr + context_first + x, mask=x < contexts, other=0) - b_first
    length = tl.load(length_ptr + query_first + q, mask=q < queries, other=0.0)
    both = length[:, None] * tl.load(context_length_ptr + context_first + x, mask=x < contexts, other=0.0)[None, :]
    line = q.to(tl.int64)[:, None]
    at, at_b = line * (ld16 * 16) + x[None, :], line * (in16 * 16) + b[None, :]
    _, c, d_c, direct = tile_gradient(
        logit_ptr, both, alpha_ptr, product_ptr, logit_ptr, w0_ptr, w1_ptr, w2_ptr, at, at_b, inside, scale,
        "cosine", False, True, True,
    )  # fmt: skip
    tl.debug_barrier()  # both have been read before they are overwritten
    tl.store(product_ptr + at, d_c / tl.maximum(both, EPS) + direct, mask=inside)
    tl.store(logit_ptr + at, tl.where(both >= EPS, d_c * c, 0.0), mask=inside)


def _sets(vector: Tensor, words: Tensor, cu_seqlens: Tensor) -> tuple[_launch.Sets, _launch.Sets]:
    return _launch.singles(vector), _launch.captions(words, cu_seqlens, bounds(cu_seqlens, len(words), OP))


def forward(vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Scores [I, T]."""
    score = vector.new_empty(len(vector), len(cu_seqlens) - 1)
    with _launch.on(vector.device):
        query, context = _sets(vector, words, cu_seqlens)
        length, others = lengths(query.rows), lengths(context.rows)
        pieces = _launch.pieces(query, context, *FORWARD, scratch_bytes(vector.device), _tiles.PIECE)
        for piece, gram in _attention.with_grams(context, pieces):
            r = _attention.attend("score", query, context, piece, gram, length, COSINE, scale, others).out
            score[piece.queries, piece.contexts] = r[:, : piece.contexts.stop - piece.contexts.start]
    return score


def backward(
    grad: Tensor, needs: list[bool], vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float
) -> list[Tensor]:
    """Gradients of those of vector and words that `needs` marks, in float32."""
    with _launch.on(vector.device):
        query, context = _sets(vector, words, cu_seqlens)
        length, others = lengths(query.rows), lengths(context.rows)
        sums = Gradients(query, context, (needs[0], needs[1]))
        pieces = _launch.pieces(query, context, *BACKWARD, scratch_bytes(vector.device), _tiles.PIECE)
        for piece, gram, m in sums.with_grams(pieces):
            attended = _attention.attend("backward", query, context, piece, gram, length, COSINE, scale, others)
            w = pool_backward(query, piece, attended, length, grad.t(), "sum", 1.0)
            gram_gradient(context, piece, attended, w[2], m)
            through_lengths = gradients_in_place(query, context, piece, attended, w, length, others, scale)
            sums.add(piece, attended.product)
            if sums.query is not None:
                own = length[piece.q].clamp_min(TINY)
                factor = w[3].sum(1) - through_lengths.sum(1) / own / own
                sums.query[piece.q].addcmul_(query.rows[piece.q], factor[:, None])
            if sums.context is not None:
                own = others[piece.x].clamp_min(TINY)
                factor = through_lengths.sum(0) / own / own
                sums.context[piece.x].addcmul_(context.rows[piece.x], factor[:, None], value=-1)
    return [d for d in (sums.query, sums.context) if d is not None]


def gradients_in_place(
    query: _launch.Sets, context: _launch.Sets, piece: _launch.Piece, attended: Attended, w: tuple[Tensor, ...],
    length: Tensor, others: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Overwrite `attended.product` with d s and `attended.logits` with d c c [vectors, words]; return the latter."""
    queries, contexts = piece.q.stop - piece.q.start, piece.x.stop - piece.x.start
    tile = _tiles.product_gradient(query.rows.dtype, _launch.arch(length.device))
    _product_gradient[(_launch.blocks(queries, tile["BLOCK_Q"]) * _launch.blocks(contexts, tile["BLOCK_X"]),)](
        attended.logits, attended.alpha, attended.product, *w[:3], length, others, context.owner,
        piece.q.start, queries, piece.x.start, contexts, piece.contexts.start, attended.logits.stride(0) // 16,
        w[0].stride(0) // 16, scale, **tile,
    )  # fmt: skip
    return attended.logits[:, :contexts]


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    types = "*fp32 " * 8 + "*i32" + " i32" * 7 + " fp32"
    yield _tiles.Compilation(_product_gradient, types, {}, _tiles.product_gradient(torch.float32, arch))
