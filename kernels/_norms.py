"""The norms of affinities over the queries of a set: those of `ops/_attention.py`.

    norm[c, x]  = norm over the queries of set c of their affinities with context row x         `_query_norms`

Only this kernel works on whole sets of queries: 4 sets per program, 16 queries of each at a time. COCO's captions fill
60 % of that, which costs little as the kernel is bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._tl import EPS, NEVER, leaky, query_lanes


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
    lane, start, size = query_lanes(start_ptr, size_ptr, set_first, group, sets, SETS, BLOCK_Q)
    start -= row_first
    x = chunk * BLOCK_X + tl.arange(0, BLOCK_X)
    m = tl.full((SETS, BLOCK_X), NEVER, tl.float32)
    total = tl.zeros((SETS, BLOCK_X), tl.float32)
    for first in range(0, tl.max(size, 0), BLOCK_Q):
        q = first + lane
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


class Norm(NamedTuple):
    """How affinities become the attention's logits: the kernels' constants of an `affinity_norm`."""

    NORM: str  # softmax, l2norm, l1norm or none, over the queries of a set; or cosine, by both rows' lengths
    CLIP: bool  # whether LeakyReLU is applied first


COSINE = Norm("cosine", False)


def norm_of(affinity_norm: str) -> Norm:
    clip = affinity_norm.startswith("clipped")
    return Norm(affinity_norm.removeprefix("clipped").lstrip("_") or "none", clip)


def query_norms(query: _launch.Sets, piece: _launch.Piece, logits: Tensor, norm: Norm, inverse: bool) -> Tensor:
    """The norms [query sets, stride of logits] of a piece's affinities [queries, contexts], or 1 / (norm + eps)."""
    sets, contexts = piece.queries.stop - piece.queries.start, piece.x.stop - piece.x.start
    norms = torch.empty(sets, logits.stride(0), dtype=torch.float32, device=logits.device)
    tile = _tiles.query_norms(query.rows.dtype, _launch.arch(logits.device))
    _query_norms[(_launch.blocks(sets, tile["SETS"]) * _launch.blocks(contexts, tile["BLOCK_X"]),)](
        logits, query.start, query.size, norms, piece.queries.start, sets, piece.q.start, contexts,
        logits.stride(0) // 16, NORM=norm.NORM, CLIP=norm.CLIP, INVERSE=inverse, **tile,
    )  # fmt: skip
    return norms


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    types = "*fp32 *i32 *i32 *fp32 i32 i32 i32 i32 i32"
    for name in ("softmax", "l1norm", "clipped_l2norm"):
        for inverse in (True, False):
            constants = dict(norm_of(name)._asdict(), INVERSE=inverse)
            yield _tiles.Compilation(_query_norms, types, constants, _tiles.query_norms(torch.float32, arch))
