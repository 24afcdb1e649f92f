"""Scores of pairs by forming their vectors, (1) to (7) of `ops/hierarchical_alignment_score.py`.

For vector gates, for pairs too large for `_alignment`, and for pairs that `_alignment` marked as poor.

A program passes over D in steps of BLOCK_D columns, twice for each side: first for each row's attended vector, its
cosine, gate and pooling logit; then for the context vector, which goes to a workspace. A last pass computes (5) to (7).
Attention weights [BLOCK_R, WORDS] of small tiles stay in registers; larger ones are computed again in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._alignment import NUMBERS, Block, Problem, cosine, root, softmax, too_large
from ._length_plan import Window
from ._tl import NEVER

EACH = 8  # captions that one program scores, one after the other: they share its workspace of two vectors [D]


@triton.jit
def _tile(pointer, row, real, d, D: tl.constexpr):
    """Columns d of rows that begin at offsets `row`, in float32; 0 where not `real` or beyond D."""
    inside = real[:, None] & (d < D)[None, :]
    return tl.load(pointer + row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _logits(logits, stride, scale, my_real, x, size):
    """scale * A of my rows with the other side's rows x; -inf beyond the other side's `size`."""
    a = tl.load(logits + x[None, :] * stride, mask=my_real[:, None] & (x < size)[None, :], other=0.0)
    return tl.where((x < size)[None, :], scale * a, NEVER)


@triton.jit
def _weighted(
    weight, logits, stride, top, inverse, scale, others, first, size, my_real, d,
    ROW: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of my rows' attended vectors: weighted sums of the rows of `others` from `first` on, whose row
    stride is ROW. CHUNK 0: `weight` holds all weights; else they are computed from logits, CHUNK rows at a time."""
    if CHUNK == 0:
        x = tl.arange(0, BLOCK_X)
        return tl.dot(weight, _tile(others, (first + x) * ROW, x < size, d, D), input_precision=PRECISION)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for step in range(0, size, CHUNK):
            x = step + tl.arange(0, CHUNK)
            e = tl.exp(_logits(logits, stride, scale, my_real, x, size) - top[:, None]) * inverse[:, None]
            acc = tl.dot(e, _tile(others, (first + x) * ROW, x < size, d, D), acc, input_precision=PRECISION)
        return acc


@triton.jit
def _fused(
    weight, logits, stride, top, inverse, scale, mine, others, my_gate, other_gate, my_row, my_real, first, size,
    gate, d,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of my rows, of their attended vectors, and of the gated mixture of both: (2) to (4)."""
    x = _tile(mine, my_row * D, my_real, d, D)
    attended = _weighted(
        weight, logits, stride, top, inverse, scale, others, first, size, my_real, d,
        D, PRECISION, D, BLOCK_M, BLOCK_X, BLOCK_D, CHUNK,
    )  # fmt: skip
    if VECTOR:
        g = _weighted(
            weight, logits, stride, top, inverse, scale, other_gate, first, size, my_real, d,
            2 * D, PRECISION, D, BLOCK_M, BLOCK_X, BLOCK_D, CHUNK,
        )  # fmt: skip
        g = tl.sigmoid(g + _tile(my_gate, my_row * (2 * D), my_real, d, D))
    else:
        g = gate[:, None]
    return x, attended, attended + g * (x - attended)


@triton.jit
def _side(
    logits, my_stride, stride, scale, mine, others, my_gate, other_gate, my_first, my_size, my_norm, first, size, norm,
    pool_ptr, context_ptr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One side of (2) to (5), whose rows ("my") attend to the other side's ("others"). Stores the context vector [D]
    (v_c or t_c) at `context_ptr`. Returns the sum of local cosines, the context vector's softmax weights over the
    other side's rows [BLOCK_X], and its squared length."""
    m, x = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_X)
    my_real, real, my_row, row = m < my_size, x < size, my_first + m, first + x
    logits += m[:, None] * my_stride
    gate = tl.zeros((BLOCK_M,), tl.float32)
    if CHUNK == 0:
        a = _logits(logits, stride, scale, my_real, x, size)
        top = tl.max(a, 1)
        weight = tl.exp(a - top[:, None])
        inverse = 1 / tl.sum(weight, 1)
        weight = weight * inverse[:, None]
        if not VECTOR:
            gate = tl.sum(weight * tl.load(other_gate + row * 2, mask=real, other=0.0).to(tl.float32)[None, :], 1)
    else:
        weight = 0.0
        top = tl.full((BLOCK_M,), NEVER, tl.float32)
        inverse = tl.zeros((BLOCK_M,), tl.float32)
        for step in range(0, size, CHUNK):
            top = tl.maximum(top, tl.max(_logits(logits, stride, scale, my_real, step + tl.arange(0, CHUNK), size), 1))
        for step in range(0, size, CHUNK):
            y = step + tl.arange(0, CHUNK)
            e = tl.exp(_logits(logits, stride, scale, my_real, y, size) - top[:, None])
            inverse += tl.sum(e, 1)
            if not VECTOR:
                adds = tl.load(other_gate + (first + y) * 2, mask=y < size, other=0.0).to(tl.float32)
                gate += tl.sum(e * adds[None, :], 1)
        inverse = 1 / inverse
        gate = gate * inverse
    if not VECTOR:
        gate = tl.sigmoid(gate + tl.load(my_gate + my_row * 2, mask=my_real, other=0.0).to(tl.float32))
    dot = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    logit = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(0, D, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        own, attended, fused = _fused(
            weight, logits, stride, top, inverse, scale, mine, others, my_gate, other_gate, my_row, my_real, first,
            size, gate, d, VECTOR, PRECISION, D, BLOCK_M, BLOCK_X, BLOCK_D, CHUNK,
        )  # fmt: skip
        dot += tl.sum(own * attended, 1)
        square += tl.sum(attended * attended, 1)
        logit += tl.sum(fused * tl.load(pool_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 1)
    local = tl.sum(tl.where(my_real, cosine(dot, my_norm, root(square)), 0.0), 0)
    gamma = softmax(tl.where(my_real, logit, NEVER), 0)
    similar = tl.zeros((BLOCK_X,), tl.float32)
    length = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, D, BLOCK_D):
        d = step + tl.arange(0, BLOCK_D)
        _, _, fused = _fused(
            weight, logits, stride, top, inverse, scale, mine, others, my_gate, other_gate, my_row, my_real, first,
            size, gate, d, VECTOR, PRECISION, D, BLOCK_M, BLOCK_X, BLOCK_D, CHUNK,
        )  # fmt: skip
        context = tl.sum(gamma[:, None] * fused, 0)
        similar += tl.sum(_tile(others, row * D, real, d, D) * context[None, :], 1)
        length += context * context
        tl.store(context_ptr + d, context, mask=d < D)
    square_c = tl.sum(length, 0)
    found = softmax(tl.where(real, cosine(similar, norm, root(square_c)), NEVER), 0)
    return local, found, square_c


@triton.jit(
    do_not_specialize=[
        "image_first", "regions", "captions", "caption_first", "word_first", "first", "number", "poor_captions", "ld16",
    ]
)  # fmt: skip
def _align_vectors(
    affinity_ptr, image_ptr, words_ptr, region_gate_ptr, word_gate_ptr, region_ptr, word_ptr, image_pool_ptr,
    caption_pool_ptr, count_ptr, start_ptr, size_ptr, order_ptr, score_ptr, poor_ptr, context_ptr,
    image_first, regions, captions, caption_first, word_first, first, number, poor_captions, ld16,
    scale, local_mix, global_mix,
    IMAGE_SIDE: tl.constexpr, CAPTION_SIDE: tl.constexpr, MEAN: tl.constexpr, VECTOR: tl.constexpr, ALL: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, WORDS: tl.constexpr, CAPTIONS: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """score [images, captions]: of all pairs with ALL, else of those that `poor_ptr` [images, window's captions] marks.

    Arguments as in `_align`; gates [all rows, 2 K], K = D with VECTOR, else 1: the image side's, then the caption
    side's. `context_ptr` [programs, 2, D] float32: workspace. CHUNK: see `_weighted`.
    One program: an image with up to CAPTIONS captions, in turn. Grid: images x groups of CAPTIONS.
    """
    K: tl.constexpr = D if VECTOR else 1
    groups = tl.cdiv(number, CAPTIONS)
    b, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    context_v = context_ptr + tl.program_id(0).to(tl.int64) * (2 * D)
    context_t = context_v + D
    b = b.to(tl.int64)
    r, w = tl.arange(0, BLOCK_R), tl.arange(0, WORDS)
    v_count = tl.load(count_ptr + image_first + b)
    v_real = r < v_count
    region_first = (image_first + b) * regions
    region = region_first + r
    v_norm = tl.load(region_ptr + region * NUMBERS, mask=v_real, other=0.0)
    for place in range(group * CAPTIONS, tl.minimum((group + 1) * CAPTIONS, number)):
        t = tl.load(order_ptr + first + place)
        wanted = True
        if not ALL:
            wanted = tl.load(poor_ptr + b * poor_captions + t - caption_first) != 0
        if wanted:
            start, t_count = tl.load(start_ptr + t).to(tl.int64), tl.load(size_ptr + t)
            t_real = w < t_count
            word = start + w
            t_norm = tl.load(word_ptr + word * NUMBERS, mask=t_real, other=0.0)
            corner = affinity_ptr + b * regions * (ld16 * 16) + start - word_first
            tl.debug_barrier()  # the workspace of the previous caption has been read
            if IMAGE_SIDE:
                v_local, found, vc_square = _side(
                    corner, ld16 * 16, 1, scale, image_ptr, words_ptr, region_gate_ptr, word_gate_ptr,
                    region_first, v_count, v_norm, start, t_count, t_norm, image_pool_ptr, context_v,
                    VECTOR, PRECISION, D, BLOCK_R, WORDS, BLOCK_D, CHUNK,
                )  # fmt: skip
                if MEAN:
                    v_local = v_local / v_count
            if CAPTION_SIDE:
                t_local, back, tc_square = _side(
                    corner, 1, ld16 * 16, scale, words_ptr, image_ptr, word_gate_ptr + K, region_gate_ptr + K,
                    start, t_count, t_norm, region_first, v_count, v_norm, caption_pool_ptr, context_t,
                    VECTOR, PRECISION, D, WORDS, BLOCK_R, BLOCK_D, CHUNK,
                )  # fmt: skip
                if MEAN:
                    t_local = t_local / t_count
            tl.debug_barrier()  # the context vectors have been written
            v_dot = tl.zeros((BLOCK_D,), tl.float32)
            v_found = tl.zeros((BLOCK_D,), tl.float32)
            v_square = tl.zeros((BLOCK_D,), tl.float32)
            t_dot = tl.zeros((BLOCK_D,), tl.float32)
            t_found = tl.zeros((BLOCK_D,), tl.float32)
            t_square = tl.zeros((BLOCK_D,), tl.float32)
            both = tl.zeros((BLOCK_D,), tl.float32)
            for step in range(0, D, BLOCK_D):
                d = step + tl.arange(0, BLOCK_D)
                x, y = _tile(image_ptr, region * D, v_real, d, D), _tile(words_ptr, word * D, t_real, d, D)
                if IMAGE_SIDE:
                    context = tl.load(context_v + d, mask=d < D, other=0.0)
                    star = tl.sum(found[:, None] * y, 0)
                    v_dot += context * star
                    v_found += star * star
                    v_global = context + star
                else:
                    v_global = tl.sum(x, 0) / v_count
                if CAPTION_SIDE:
                    context = tl.load(context_t + d, mask=d < D, other=0.0)
                    star = tl.sum(back[:, None] * x, 0)
                    t_dot += context * star
                    t_found += star * star
                    t_global = context + star
                else:
                    t_global = tl.sum(y, 0) / t_count
                both += v_global * t_global
                v_square += v_global * v_global
                t_square += t_global * t_global
            score = cosine(tl.sum(both, 0), root(tl.sum(v_square, 0)), root(tl.sum(t_square, 0)))
            if IMAGE_SIDE:
                v_whole = cosine(tl.sum(v_dot, 0), root(vc_square), root(tl.sum(v_found, 0)))
            if CAPTION_SIDE:
                t_whole = cosine(tl.sum(t_dot, 0), root(tc_square), root(tl.sum(t_found, 0)))
            if IMAGE_SIDE and CAPTION_SIDE:
                score += local_mix * v_local + (1 - local_mix) * t_local
                score += global_mix * v_whole + (1 - global_mix) * t_whole
            elif IMAGE_SIDE:
                score += v_local + v_whole
            else:
                score += t_local + t_whole
            tl.store(score_ptr + (image_first + b) * captions + t, score.to(score_ptr.dtype.element_ty))


def programs(images: int, window: Window) -> int:
    """The most programs that one launch for `images` and a group of the window has."""
    captions = max((group.captions for group in window.groups), default=0)
    return images * _launch.blocks(captions, EACH)


def align_vectors(given: Problem, block: Block, affinities: Tensor, score: Tensor, poor: Tensor) -> None:
    """Write the scores of a block's pairs; of groups that `align` has scored, only those that `poor` marks."""
    images, dtype = block.images, given.images.rows.dtype
    D = given.images.rows.shape[1]
    precision = (_tiles.products if given.vector else _tiles.exact)(dtype)  # poor pairs need all digits
    count = programs(images.stop - images.start, block.window)
    contexts = torch.empty(count, 2 * D, dtype=torch.float32, device=score.device)
    for group in block.window.groups:
        tile = _tiles.alignment_vectors(dtype, _launch.arch(score.device), given.tile, group.size)
        groups = _launch.blocks(group.captions, EACH)
        _align_vectors[((images.stop - images.start) * groups,)](
            affinities, given.images.rows, given.captions.rows, given.image_gate, given.word_gate,
            given.region_numbers, given.word_numbers, given.image_pool, given.caption_pool,
            given.images.size, given.captions.start, given.captions.size, block.order, score, poor, contexts,
            images.start, given.regions, score.shape[1], block.window.captions.start, block.window.rows.start,
            group.first, group.captions, poor.shape[1], affinities.stride(0) // 16,
            given.scale, given.local_mix, given.global_mix, **given.sides, VECTOR=given.vector,
            ALL=too_large(given, group), D=D,
            PRECISION=precision, BLOCK_R=given.tile, WORDS=group.size, CAPTIONS=EACH, **tile,
        )  # fmt: skip


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    # (regions of a tile, words of a caption, IMAGE_SIDE, CAPTION_SIDE, VECTOR)
    published, scalar = (64, 16, True, True, True), (64, 16, True, True, False)
    long = [(128, 128, True, True, True)]
    more = [(64, 128, True, True, True), (128, 128, True, True, False)]
    sides = [(64, 16, True, False, True), (64, 16, False, True, True)]
    ways = {"fp32": [scalar, *long, *more, *sides], "fp16": [scalar, *long], "bf16": []}
    for dtype, t in _tiles.NAMES.items():
        exact, most = _tiles.exact(dtype), _tiles.coefficients(dtype, arch)
        chosen = [(published, precision) for precision in _tiles.precisions(dtype)] + [(w, exact) for w in ways[t]]
        for (regions, words, image_side, caption_side, vector), precision in chosen:
            small = regions <= most[0] and words <= most[1]
            constants: dict[str, Any] = dict(IMAGE_SIDE=image_side, CAPTION_SIDE=caption_side, MEAN=True)
            constants |= dict(VECTOR=vector, ALL=vector or not small, D=1024, PRECISION=precision)
            constants |= dict(BLOCK_R=regions, WORDS=words, CAPTIONS=EACH)
            types = f"*fp32 *{t} *{t} *{t} *{t} *fp32 *fp32 *{t} *{t} *i32 *i32 *i32 *i32 *{t} *i8 *fp32"
            tile = _tiles.alignment_vectors(dtype, arch, regions, words)
            yield _tiles.Compilation(_align_vectors, types + " i32" * 9 + " fp32" * 3, constants, tile)
