"""Scores of pairs with scalar gates, (1) to (9) of `ops/hierarchical_alignment_score.py`, from coefficients alone.

    |x|, m . x, n . x of every row x of regions and words                                       `_numbers`
    scores of pairs from A, C, G, H and these numbers; no vector [D] of a pair is formed        `_align`

`_align` keeps matrices [BLOCK_R, CAPTIONS * WORDS] in registers, of which 36 regions and COCO's captions fill 43 %. The
H of all captions of a program form one block diagonal matrix, so products with them are one matrix product. A NaN in
one caption would spread to the others there, so `finite` removes it. Products of G with single vectors are one matrix
product too, with a column for each caption.

If a vector is much shorter than the terms it is summed from, its length is dominated by cancellation error. `_align`
then marks the pair as poor, and `_alignment_vectors` scores it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from itm_fast.packing import bounds

from . import _launch, _tiles
from ._length_plan import Group, Window
from ._tl import CANCELLED, EPS, NEVER, finite

TINY = tl.constexpr(1.1754944e-38)  # float32's smallest normal number: keeps a root and its reciprocal finite
NUMBERS = tl.constexpr(4)  # row stride of the numbers |x|, m . x, n . x; the fourth is unused and aligns rows


@triton.jit(do_not_specialize=["rows"])
def _numbers(
    row_ptr, image_pool_ptr, caption_pool_ptr, out_ptr, rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, NUMBERS] = |x|, m . x, n . x of rows [rows, D]; the pools m and n are [D].

    One program: BLOCK_M rows. Grid: blocks of rows.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    square = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    image = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    caption = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(0, D, BLOCK_K):
        inside = (row < rows)[:, None] & (step + k < D)[None, :]
        x = tl.load(row_ptr + row[:, None] * D + step + k[None, :], mask=inside, other=0.0).to(tl.float32)
        square += x * x
        image += x * tl.load(image_pool_ptr + step + k, mask=step + k < D, other=0.0).to(tl.float32)[None, :]
        caption += x * tl.load(caption_pool_ptr + step + k, mask=step + k < D, other=0.0).to(tl.float32)[None, :]
    out, real = out_ptr + row * NUMBERS, row < rows
    tl.store(out, tl.sqrt(tl.sum(square, 1)), mask=real)
    tl.store(out + 1, tl.sum(image, 1), mask=real)
    tl.store(out + 2, tl.sum(caption, 1), mask=real)


@triton.jit
def softmax(x, AXIS: tl.constexpr):
    """Softmax over an axis of a tile in registers."""
    e = tl.exp(x - tl.max(x, AXIS, keep_dims=True))
    return e / tl.sum(e, AXIS, keep_dims=True)


@triton.jit
def root(square):
    """Square root, never 0."""
    return tl.sqrt(tl.maximum(square, TINY))


@triton.jit
def cosine(dot, length_a, length_b):
    """dot / max(|a| |b|, eps)."""
    return dot / tl.maximum(length_a * length_b, EPS)


@triton.jit
def _any(flags, AXIS: tl.constexpr):
    """1 where any flag along the axis is set, else 0."""
    return tl.max(flags.to(tl.int32), AXIS)


@triton.jit(
    do_not_specialize=[
        "image_first", "regions", "captions", "caption_first", "word_first", "first", "number", "poor_captions", "ld16",
        "gram_v16", "gram_t16",
    ]
)  # fmt: skip
def _align(
    affinity_ptr, cross_ptr, gram_v_ptr, gram_t_ptr, region_ptr, word_ptr, region_gate_ptr, word_gate_ptr,
    count_ptr, start_ptr, size_ptr, order_ptr, score_ptr, poor_ptr,
    image_first, regions, captions, caption_first, word_first, first, number, poor_captions, ld16, gram_v16, gram_t16,
    scale, local_mix, global_mix,
    IMAGE_SIDE: tl.constexpr, CAPTION_SIDE: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, WORDS: tl.constexpr, CAPTIONS: tl.constexpr,
):  # fmt: skip
    """score [images, captions], and poor [images, captions of the window] int8: 1 where digits were lost.

    `affinity_ptr` A and `cross_ptr` C: [regions of the block, words of the window]. `gram_v_ptr` G and `gram_t_ptr` H:
    one row per region and word. `region_ptr`, `word_ptr`: `_numbers` of all rows. Gates [all rows, 2]: column 0 serves
    the image side (3, g_i), column 1 the caption side (g_j). `order_ptr`[first : first + number]: the captions.
    One program: an image with CAPTIONS captions of at most WORDS words. Grid: images x groups of CAPTIONS.
    """
    COLUMNS: tl.constexpr = CAPTIONS * WORDS
    groups = tl.cdiv(number, CAPTIONS)
    b, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    b = b.to(tl.int64)
    r, w = tl.arange(0, BLOCK_R), tl.arange(0, WORDS)
    v_count = tl.load(count_ptr + image_first + b)
    v_real = r < v_count
    place = group * CAPTIONS + tl.arange(0, CAPTIONS)
    t = tl.load(order_ptr + first + tl.minimum(place, number - 1))  # past the end: the last one, not stored
    t_start, t_count = tl.load(start_ptr + t), tl.load(size_ptr + t)
    t_real = w[None, :] < t_count[:, None]  # [CAPTIONS, WORDS]
    inside = v_real[:, None, None] & t_real[None]  # [BLOCK_R, CAPTIONS, WORDS]

    corner = b * regions * (ld16 * 16)
    at = (r * (ld16 * 16))[:, None, None] + ((t_start - word_first)[:, None] + w[None, :])[None]
    affinity = tl.load(affinity_ptr + corner + at, mask=inside, other=0.0) * scale
    cross = tl.load(cross_ptr + corner + at, mask=inside, other=0.0)
    region = (image_first + b) * regions + r
    v_norm = tl.load(region_ptr + region * NUMBERS, mask=v_real, other=0.0)
    word = t_start.to(tl.int64)[:, None] + w[None, :]
    t_norm = tl.load(word_ptr + word * NUMBERS, mask=t_real, other=0.0)
    # H of each caption, as a block diagonal matrix [COLUMNS, COLUMNS].
    n = tl.arange(0, COLUMNS)
    owner = tl.load(order_ptr + first + tl.minimum(group * CAPTIONS + n // WORDS, number - 1))
    n_real = n % WORDS < tl.load(size_ptr + owner)
    row = (tl.load(start_ptr + owner) - word_first + n % WORDS).to(tl.int64)
    same = (n // WORDS)[:, None] == (n // WORDS)[None, :]
    gram = row[:, None] * (gram_t16 * 16) + (n % WORDS)[None, :]
    gram_t = tl.load(gram_t_ptr + gram, mask=same & n_real[:, None] & n_real[None, :], other=0.0)

    # From here on, one number for each caption: [CAPTIONS].
    v_highest, t_highest = tl.max(v_norm * v_norm, 0), tl.max(t_norm * t_norm, 1)
    highest = tl.maximum(v_highest, t_highest)
    v_size, t_size = v_count.to(tl.float32), t_count.to(tl.float32)
    poor = tl.zeros((CAPTIONS,), tl.int32)
    if IMAGE_SIDE:
        alpha = softmax(tl.where(t_real[None], affinity, NEVER), 2)
        product = tl.dot(finite(alpha).reshape(BLOCK_R, COLUMNS), gram_t, input_precision=PRECISION)
        product = product.reshape(BLOCK_R, CAPTIONS, WORDS)  # H alpha
        square = tl.sum(alpha * product, 2)  # [BLOCK_R, CAPTIONS]
        cosines = cosine(tl.sum(alpha * cross, 2), v_norm[:, None], root(square))
        v_local = tl.sum(tl.where(v_real[:, None], cosines, 0.0), 0)
        if MEAN:
            v_local = v_local / v_size
        poor = poor | _any((square < t_highest[None, :] * CANCELLED) & v_real[:, None], 0)
        gate = tl.sum(alpha * tl.load(word_gate_ptr + word * 2, mask=t_real, other=0.0).to(tl.float32)[None], 2)
        gate += tl.load(region_gate_ptr + region * 2, mask=v_real, other=0.0).to(tl.float32)[:, None]
        gate = tl.sigmoid(gate)
        pool = tl.sum(alpha * tl.load(word_ptr + word * NUMBERS + 1, mask=t_real, other=0.0)[None], 2)
        own = tl.load(region_ptr + region * NUMBERS + 1, mask=v_real, other=0.0)[:, None]
        gamma = softmax(tl.where(v_real[:, None], gate * own + (1 - gate) * pool, NEVER), 0)
        p = gamma * gate  # v_c = V^T p + T^T q
        rest = gamma - p
        q = tl.sum(rest[:, :, None] * alpha, 0)  # [CAPTIONS, WORDS]
        vc_v = tl.sum(cross * q[None], 2)  # v_c . v_i without its term (G p)_i, which is added below
        vc_t = tl.sum(p[:, :, None] * cross + rest[:, :, None] * product, 0)  # v_c . t_j
    if IMAGE_SIDE and CAPTION_SIDE:  # load again instead of keeping them: registers are scarce
        tl.debug_barrier()
        affinity = tl.load(affinity_ptr + corner + at, mask=inside, other=0.0) * scale
        cross = tl.load(cross_ptr + corner + at, mask=inside, other=0.0)
    gram_v = gram_v_ptr + (b * regions + r)[:, None] * (gram_v16 * 16)
    if CAPTION_SIDE:
        beta = softmax(tl.where(v_real[:, None, None], affinity, NEVER), 0)
        product = _by_image(beta, gram_v, v_count, BLOCK_R, CAPTIONS, WORDS, PRECISION)  # G beta
        square = tl.sum(beta * product, 0)  # [CAPTIONS, WORDS]
        cosines = cosine(tl.sum(beta * cross, 0), t_norm, root(square))
        t_local = tl.sum(tl.where(t_real, cosines, 0.0), 1)
        if MEAN:
            t_local = t_local / t_size
        poor = poor | _any((square < v_highest * CANCELLED) & t_real, 1)
        own = tl.load(region_gate_ptr + region * 2 + 1, mask=v_real, other=0.0).to(tl.float32)
        gate = tl.sum(beta * own[:, None, None], 0)
        gate += tl.load(word_gate_ptr + word * 2 + 1, mask=t_real, other=0.0).to(tl.float32)
        gate = tl.sigmoid(gate)
        pool = tl.sum(beta * tl.load(region_ptr + region * NUMBERS + 2, mask=v_real, other=0.0)[:, None, None], 0)
        own = tl.load(word_ptr + word * NUMBERS + 2, mask=t_real, other=0.0)
        gamma = softmax(tl.where(t_real, gate * own + (1 - gate) * pool, NEVER), 1)
        u = gamma * gate  # t_c = V^T s + T^T u
        rest = gamma - u
        s = tl.sum(rest[None] * beta, 2)  # [BLOCK_R, CAPTIONS]
        tc_v = tl.sum(rest[None] * product + u[None] * cross, 2)  # t_c . v_i
        tc_t = tl.sum(s[:, :, None] * cross, 0) + _by_captions(u, gram_t, CAPTIONS, WORDS)  # t_c . t_j
        tc_square = tl.sum(s * tc_v, 0) + tl.sum(u * tc_t, 1)
        poor = poor | (tc_square < highest * CANCELLED)
        back = cosine(tc_v, v_norm[:, None], root(tc_square)[None, :])
        back = softmax(tl.where(v_real[:, None], back, NEVER), 0)  # v*_c = V^T back
    # G p and G back in one product: column 0 of a caption holds p, column 1 holds back.
    columns = tl.zeros((BLOCK_R, CAPTIONS, WORDS), tl.float32)
    if IMAGE_SIDE:
        columns = tl.where(w == 0, p[:, :, None], columns)
    if CAPTION_SIDE:
        columns = tl.where(w == 1, back[:, :, None], columns)
    columns = _by_image(columns, gram_v, v_count, BLOCK_R, CAPTIONS, WORDS, PRECISION)
    if IMAGE_SIDE:
        vc_v += tl.sum(tl.where(w == 0, columns, 0.0), 2)
        vc_square = tl.sum(p * vc_v, 0) + tl.sum(q * vc_t, 1)
        poor = poor | (vc_square < highest * CANCELLED)
        found = cosine(vc_t, t_norm, root(vc_square)[:, None])
        found = softmax(tl.where(t_real, found, NEVER), 1)  # t*_c = T^T found
        found_t = _by_captions(found, gram_t, CAPTIONS, WORDS)
        found_square, dot = tl.sum(found * found_t, 1), tl.sum(found * vc_t, 1)
        v_whole = cosine(dot, root(vc_square), root(found_square))
        vg_square = vc_square + 2 * dot + found_square
        poor = poor | (found_square < t_highest * CANCELLED) | (vg_square < highest * CANCELLED)
    if CAPTION_SIDE:
        back_v = tl.sum(tl.where(w == 1, columns, 0.0), 2)  # [BLOCK_R, CAPTIONS]
        back_square, dot = tl.sum(back * back_v, 0), tl.sum(back * tc_v, 0)
        t_whole = cosine(dot, root(tc_square), root(back_square))
        tg_square = tc_square + 2 * dot + back_square
        poor = poor | (back_square < v_highest * CANCELLED) | (tg_square < highest * CANCELLED)
    if IMAGE_SIDE and CAPTION_SIDE:
        dot = tl.sum((s + back) * vc_v + back * tl.sum(cross * found[None], 2), 0)
        dot += tl.sum(u * vc_t + found * tc_t, 1)
        score = local_mix * v_local + (1 - local_mix) * t_local + global_mix * v_whole + (1 - global_mix) * t_whole
    elif IMAGE_SIDE:  # t_g is the mean of the words
        tg_square = tl.sum(tl.sum(gram_t, 0).reshape(CAPTIONS, WORDS), 1) / (t_size * t_size)
        poor = poor | (tg_square < t_highest * CANCELLED)
        dot = tl.sum(tl.where(t_real, vc_t + found_t, 0.0), 1) / t_size
        score = v_local + v_whole
    else:
        gram = tl.load(gram_v + r[None, :], mask=v_real[:, None] & v_real[None, :], other=0.0)
        vg_square = tl.sum(tl.sum(gram, 0), 0) / (v_size * v_size)
        poor = poor | (vg_square < v_highest * CANCELLED)
        dot = tl.sum(tl.where(v_real[:, None], tc_v + back_v, 0.0), 0) / v_size
        vg_square += tl.zeros_like(dot)
        score = t_local + t_whole
    score += cosine(dot, root(vg_square), root(tg_square))
    out = (image_first + b) * captions + t
    tl.store(score_ptr + out, score.to(score_ptr.dtype.element_ty), mask=place < number)
    tl.store(poor_ptr + b * poor_captions + t - caption_first, poor.to(tl.int8), mask=place < number)


@triton.jit
def _by_image(
    x, gram, count, BLOCK_R: tl.constexpr, CAPTIONS: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr
):
    """G x [BLOCK_R, CAPTIONS, WORDS] as a sum of two products over half the regions: operands of half the size."""
    HALF: tl.constexpr = BLOCK_R // 2
    r, half = tl.arange(0, BLOCK_R), tl.arange(0, HALF)
    low, high = tl.split(x.reshape(2, HALF, CAPTIONS * WORDS).permute(1, 2, 0))
    real = r[:, None] < count
    left = tl.load(gram + half[None, :], mask=real & (half[None, :] < count), other=0.0)
    product = tl.dot(left, low, input_precision=PRECISION)
    left = tl.load(gram + HALF + half[None, :], mask=real & (HALF + half[None, :] < count), other=0.0)
    return tl.dot(left, high, product, input_precision=PRECISION).reshape(BLOCK_R, CAPTIONS, WORDS)


@triton.jit
def _by_captions(x, gram_t, CAPTIONS: tl.constexpr, WORDS: tl.constexpr):
    """H x [CAPTIONS, WORDS] for every caption; `gram_t` is block diagonal."""
    x = finite(x).reshape(CAPTIONS * WORDS)
    return tl.sum(x[:, None] * gram_t, 0).reshape(CAPTIONS, WORDS)


def numbers(rows: Tensor, image_pool: Tensor, caption_pool: Tensor) -> Tensor:
    """|x|, m . x and n . x of rows [n, D] -> [n, NUMBERS] float32."""
    out = torch.empty(len(rows), NUMBERS.value, dtype=torch.float32, device=rows.device)
    if len(rows):
        tile = _tiles.alignment_numbers(rows.dtype, _launch.arch(rows.device))
        _numbers[(_launch.blocks(len(rows), tile["BLOCK_M"]),)](
            rows, image_pool, caption_pool, out, len(rows), D=rows.shape[1], **tile
        )  # fmt: skip
    return out


class Problem(NamedTuple):
    """An op call's arguments, laid out for the kernels. `region_numbers`, `word_numbers`: results of `numbers`."""

    images: _launch.Sets
    captions: _launch.Sets
    image_key: Tensor
    image_gate: Tensor
    word_key: Tensor
    word_gate: Tensor
    image_pool: Tensor
    caption_pool: Tensor
    region_numbers: Tensor
    word_numbers: Tensor
    regions: int
    tile: int
    direction: str
    scale: float
    mean: bool
    local_mix: float
    global_mix: float

    @property
    def vector(self) -> bool:
        """Whether a gate has D numbers instead of one."""
        return self.image_gate.shape[-1] > 1

    @property
    def sides(self) -> dict[str, bool]:
        return dict(IMAGE_SIDE=self.direction != "t2i", CAPTION_SIDE=self.direction != "i2t", MEAN=self.mean)


class Block(NamedTuple):
    """Images and a window of captions that are scored together. `order`: all captions by length (`LengthPlan`)."""

    images: slice
    window: Window
    order: Tensor


def problem(
    op: str, image: Tensor, image_key: Tensor, image_gate: Tensor, words: Tensor, word_key: Tensor, word_gate: Tensor,
    image_pool: Tensor, caption_pool: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None,
    direction: str, scale: float, pool: str, local_mix: float, global_mix: float,
) -> Problem:  # fmt: skip
    """The op's arguments, laid out for the kernels.

    Raises:
        ValueError: a count or a bound is wrong.
    """
    I, R, _ = image.shape
    tile = _launch.power_of_two(R, least=32)  # `_by_image` multiplies halves of 16 rows or more
    images = _launch.regions(op, image, region_lengths)
    captions = _launch.captions(words, cu_seqlens, bounds(cu_seqlens, len(words), op))
    pools = _launch.aligned(image_pool), _launch.aligned(caption_pool)
    return Problem(
        images, captions, _launch.aligned(image_key).view(I * R, -1), _launch.aligned(image_gate),
        _launch.aligned(word_key), _launch.aligned(word_gate), *pools,
        numbers(images.rows, *pools), numbers(captions.rows, *pools), R, tile,
        direction, scale, pool == "mean", local_mix, global_mix,
    )  # fmt: skip


def too_large(given: Problem, group: Group) -> bool:
    """Whether `_alignment_vectors` scores a group's pairs: vector gates, or a tile that does not fit `_align`."""
    dtype, arch = given.images.rows.dtype, _launch.arch(given.images.rows.device)
    regions, words = _tiles.coefficients(dtype, arch)
    return given.vector or given.tile > regions or group.size > words


def align(
    given: Problem, block: Block, affinities: Tensor, cross: Tensor, gram_v: Tensor, gram_t: Tensor, score: Tensor,
    poor: Tensor,
) -> None:  # fmt: skip
    """Write the scores of a block's pairs, and into `poor` [images, captions] which ones must be scored again.

    Groups that are `too_large` are left to `align_vectors`.
    """
    images, words, dtype = block.images, block.window.rows, given.images.rows.dtype
    for group in block.window.groups:
        if too_large(given, group):
            continue
        tile = _tiles.alignment(dtype, _launch.arch(score.device), group.size)
        groups = _launch.blocks(group.captions, tile["CAPTIONS"])
        _align[((images.stop - images.start) * groups,)](
            affinities, cross, gram_v, gram_t, given.region_numbers, given.word_numbers, given.image_gate,
            given.word_gate, given.images.size, given.captions.start, given.captions.size, block.order, score, poor,
            images.start, given.regions, score.shape[1], block.window.captions.start, words.start, group.first,
            group.captions, poor.shape[1], affinities.stride(0) // 16, gram_v.stride(0) // 16, gram_t.stride(0) // 16,
            given.scale, given.local_mix, given.global_mix,
            **given.sides, PRECISION=_tiles.exact(dtype), BLOCK_R=given.tile, WORDS=group.size, **tile,
        )  # fmt: skip


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for dtype, t in _tiles.NAMES.items():
        yield _tiles.Compilation(
            _numbers, f"*{t} *{t} *{t} *fp32 i32", dict(D=1024), _tiles.alignment_numbers(dtype, arch)
        )
        largest, most = _tiles.coefficients(dtype, arch)
        # (regions of a tile, words of a caption, IMAGE_SIDE, CAPTION_SIDE)
        ways = [(largest, words, True, True) for words in _tiles.CAPTION_TILES if words <= most]
        if dtype == torch.float32:
            ways += [(32, 16, True, True), (largest, most, True, False), (largest, most, False, True)]
        for regions, words, image_side, caption_side in ways if dtype != torch.bfloat16 else ways[:1]:
            constants: dict[str, Any] = dict(IMAGE_SIDE=image_side, CAPTION_SIDE=caption_side, MEAN=True)
            constants |= dict(BLOCK_R=regions, WORDS=words, PRECISION=_tiles.exact(dtype))
            types = "*fp32 " * 6 + f"*{t} *{t} *i32 *i32 *i32 *i32 *{t} *i8" + " i32" * 11 + " fp32" * 3
            yield _tiles.Compilation(_align, types, constants, _tiles.alignment(dtype, arch, words))
