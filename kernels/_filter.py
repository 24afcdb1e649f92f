"""Attention filtration of nodes: (1) to (10) of `ops/similarity_filter.py`.

    z, or the pair's score, from the nodes of a caption, which are read once                    `_filter`
    a of all nodes, in training only                                                            `_significances`
    a caption's statistics over all images: mean and variance, or the means of (9)              `_moments`
    gradients of the nodes and of the parameters                                                `_filter_back`

There is no matrix product: the time is that of reading the nodes, in chunks of 8 rows, 83 % of which are nodes with
COCO's lengths. In training `_filter_back` runs twice: first for d h only, whose means (9) needs, then for gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._graph import End, Rows
from ._tl import EPS


@triton.jit
def _gate(bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, t, eps, TRAINING: tl.constexpr):
    """Return (gamma * inv_std, inv_std, b - mean, delta) for caption t, inv_std = 1 / sqrt(var + eps)."""
    at = t if TRAINING else 0
    inverse = 1.0 / tl.sqrt(tl.load(var_ptr + at) + eps)
    offset = tl.load(bias_ptr) - tl.load(mean_ptr + at)
    return tl.load(norm_weight_ptr) * inverse, inverse, offset, tl.load(norm_bias_ptr)


@triton.jit
def _gather(x_ptr, weight, start, stop, x_origin, scale, offset, delta, s, S: tl.constexpr, BLOCK_R: tl.constexpr):
    """Sums of g and of g x [PADDED] over the nodes start..stop of a caption: (1), (2) and the sums in (3), (4)."""
    total = tl.sum(tl.zeros_like(weight), 0)
    m = tl.zeros_like(weight)
    for at in range(start, stop, BLOCK_R):
        row = at + tl.arange(0, BLOCK_R)
        place = (row - x_origin).to(tl.int64)[:, None] * S + s
        x = tl.load(x_ptr + place, mask=(row < stop)[:, None] & (s < S), other=0.0).to(tl.float32)
        g = tl.sigmoid((tl.sum(x * weight[None, :], 1) + offset) * scale + delta)
        g = tl.where(row < stop, g, 0.0)
        total += tl.sum(g, 0)
        m += tl.sum(x * g[:, None], 0)
    return total, m


@triton.jit(
    do_not_specialize=["groups", "first", "last", "x_first", "x_image", "x_origin", "y_first", "y_image", "y_origin"]
)
def _filter(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, start_ptr, y_ptr,
    score_weight_ptr, score_bias_ptr,
    groups, first, last, x_first, x_image, x_origin, y_first, y_image, y_origin, eps,
    S: tl.constexpr, CAPTIONS: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr, TRAINING: tl.constexpr,
    SCORE: tl.constexpr, LOGIT: tl.constexpr,
):  # fmt: skip
    """(1) to (4): z of every pair into y as rows of S; with SCORE, sigmoid(w_e . z + b_e) as single values;
    with LOGIT without the sigmoid.

    `x_ptr`: nodes; (x_first, x_image, x_origin) and (y_...) are the fields of `Rows`. mean, var: [1], or per caption of
    the window when TRAINING. `start_ptr` [T + 1]. One program: an image with captions first + CAPTIONS * group, ...,
    below `last`. Grid: images x groups.
    """
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    s = tl.arange(0, PADDED)
    x_ptr += (x_first + image) * x_image * S
    weight = tl.load(weight_ptr + s, mask=s < S, other=0.0)
    begin = first + group * CAPTIONS
    for t in range(begin, tl.minimum(begin + CAPTIONS, last)):
        scale, _, offset, delta = _gate(
            bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, t - first, eps, TRAINING
        )
        start, stop = tl.load(start_ptr + t), tl.load(start_ptr + t + 1)
        total, m = _gather(x_ptr, weight, start, stop, x_origin, scale, offset, delta, s, S, BLOCK_R)
        m = m / (total + EPS)
        z = m / (tl.sqrt(tl.sum(m * m, 0)) + EPS)
        to = (y_first + image) * y_image + t - y_origin
        if SCORE:
            end = tl.load(score_weight_ptr + s, mask=s < S, other=0.0).to(tl.float32)
            score = tl.sum(z * end, 0) + tl.load(score_bias_ptr).to(tl.float32)
            if not LOGIT:
                score = tl.sigmoid(score)
            tl.store(y_ptr + to, score.to(y_ptr.dtype.element_ty))
        else:
            tl.store(y_ptr + to * S + s, z.to(y_ptr.dtype.element_ty), mask=s < S)


@triton.jit(do_not_specialize=["blocks", "rows", "x_image", "x_origin"])
def _significances(
    x_ptr, weight_ptr, bias_ptr, a_ptr, blocks, rows, x_image, x_origin,
    S: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(1): a [images, rows] = w . x + b of nodes x_origin, ... of each image, which has x_image nodes.

    One program: BLOCK_R nodes of an image. Grid: images x blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    image, block = program // blocks, program % blocks
    s = tl.arange(0, PADDED)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    place = (image * x_image + x_origin + row)[:, None] * S + s
    x = tl.load(x_ptr + place, mask=(row < rows)[:, None] & (s < S), other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + s, mask=s < S, other=0.0)
    tl.store(a_ptr + image * rows + row, tl.sum(x * weight[None, :], 1) + tl.load(bias_ptr), mask=row < rows)


@triton.jit(do_not_specialize=["first", "images", "rows", "origin"])
def _moments(
    a_ptr, h_ptr, start_ptr, mean_ptr, var_ptr, one_ptr, two_ptr, first, images, rows, origin, eps,
    BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Per caption, over all images and nodes: mean and biased variance of a; BACKWARD: means of d h and of a^ d h.

    `a_ptr`, `h_ptr` (d h): [images, rows], row 0 is packed node `origin`. Results [captions]. One program: a caption.
    """
    t = tl.program_id(0)
    start, stop = tl.load(start_ptr + first + t) - origin, tl.load(start_ptr + first + t + 1) - origin
    count = images.to(tl.float32) * (stop - start).to(tl.float32)
    one = tl.zeros([BLOCK_I, BLOCK_R], tl.float32)
    two = tl.zeros([BLOCK_I, BLOCK_R], tl.float32)
    if BACKWARD:
        mean = tl.load(mean_ptr + t)
        inverse = 1.0 / tl.sqrt(tl.load(var_ptr + t) + eps)
    for i in range(0, images, BLOCK_I):
        image = i + tl.arange(0, BLOCK_I)
        for at in range(start, stop, BLOCK_R):
            row = at + tl.arange(0, BLOCK_R)
            place = image.to(tl.int64)[:, None] * rows + row[None, :]
            mask = (image < images)[:, None] & (row < stop)[None, :]
            a = tl.load(a_ptr + place, mask=mask, other=0.0)
            if BACKWARD:
                h = tl.load(h_ptr + place, mask=mask, other=0.0)
                one += h
                two += h * (a - mean) * inverse
            else:
                one += a
    value = tl.sum(tl.sum(one, 1), 0) / count
    tl.store(one_ptr + t, value)
    if not BACKWARD:
        for i in range(0, images, BLOCK_I):
            image = i + tl.arange(0, BLOCK_I)
            for at in range(start, stop, BLOCK_R):
                row = at + tl.arange(0, BLOCK_R)
                place = image.to(tl.int64)[:, None] * rows + row[None, :]
                mask = (image < images)[:, None] & (row < stop)[None, :]
                off = tl.where(mask, tl.load(a_ptr + place, mask=mask, other=0.0) - value, 0.0)
                two += off * off
    tl.store(two_ptr + t, tl.sum(tl.sum(two, 1), 0) / count)


@triton.jit(do_not_specialize=["groups", "first", "last", "captions", "image_first", "x_image", "h_rows", "h_origin"])
def _filter_back(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, start_ptr, dz_ptr, h_ptr,
    mean_h_ptr, mean_ah_ptr, dx_ptr, part_ptr,
    groups, first, last, captions, image_first, x_image, h_rows, h_origin, eps,
    S: tl.constexpr, CAPTIONS: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr, TRAINING: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """(5) to (10): d x (`dx_ptr`), and the program's sums of d w, d b, d gamma, d delta: part [programs, S + 3].

    SUMS: only d h of the nodes, into `h_ptr` [images, h_rows], whose row 0 is packed node `h_origin`. `mean_h_ptr` and
    `mean_ah_ptr` [captions of the window]: the means of (9), read when TRAINING. `dz_ptr` [I, captions, S].
    One program: an image with up to CAPTIONS captions. Grid: images x groups.
    """
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    s = tl.arange(0, PADDED)
    h_ptr += image * h_rows - h_origin
    image += image_first
    x_ptr += image * x_image * S
    dx_ptr += image * x_image * S
    weight = tl.load(weight_ptr + s, mask=s < S, other=0.0)
    d_weight = tl.zeros([PADDED], tl.float32)
    d_bias = tl.zeros([BLOCK_R], tl.float32)
    d_norm_weight = tl.zeros([BLOCK_R], tl.float32)
    d_norm_bias = tl.zeros([BLOCK_R], tl.float32)
    begin = first + group * CAPTIONS
    for t in range(begin, tl.minimum(begin + CAPTIONS, last)):
        scale, inverse, offset, delta = _gate(
            bias_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, var_ptr, t - first, eps, TRAINING
        )
        start, stop = tl.load(start_ptr + t), tl.load(start_ptr + t + 1)
        total, m = _gather(x_ptr, weight, start, stop, 0, scale, offset, delta, s, S, BLOCK_R)
        share = 1.0 / (total + EPS)
        m = m * share
        length = tl.sqrt(tl.sum(m * m, 0))
        z = m / (length + EPS)
        dz = tl.load(dz_ptr + (image * captions + t) * S + s, mask=s < S, other=0.0).to(tl.float32)
        along = tl.where(length > 0, tl.sum(dz * z, 0) / length, 0.0)
        dm = dz / (length + EPS) - along * z
        middle = tl.sum(dm * m, 0)  # sum_p beta_p d beta_p of (6)
        if TRAINING and not SUMS:
            mean_h, mean_ah = tl.load(mean_h_ptr + t - first), tl.load(mean_ah_ptr + t - first)
        for at in range(start, stop, BLOCK_R):
            row = at + tl.arange(0, BLOCK_R)
            place = row.to(tl.int64)[:, None] * S + s
            mask = (row < stop)[:, None] & (s < S)
            x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
            a = tl.sum(x * weight[None, :], 1) + offset  # a - mean
            g = tl.where(row < stop, tl.sigmoid(a * scale + delta), 0.0)
            h = g * (1 - g) * (tl.sum(x * dm[None, :], 1) - middle) * share
            if SUMS:
                tl.store(h_ptr + row, h, mask=row < stop)
            else:
                d_norm_weight += h * a * inverse
                d_norm_bias += h
                da = h
                if TRAINING:
                    da = tl.where(row < stop, h - mean_h - a * inverse * mean_ah, 0.0)
                da = da * scale
                d_bias += da
                d_weight += tl.sum(x * da[:, None], 0)
                dx = (g * share)[:, None] * dm[None, :] + da[:, None] * weight[None, :]
                tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if not SUMS:
        part_ptr += program * (S + 3)
        tl.store(part_ptr + s, d_weight, mask=s < S)
        tl.store(part_ptr + S, tl.sum(d_bias, 0))
        tl.store(part_ptr + S + 1, tl.sum(d_norm_weight, 0))
        tl.store(part_ptr + S + 2, tl.sum(d_norm_bias, 0))


class Parameters(NamedTuple):
    """w [S], b, gamma and delta [1], mean and var [1] (in training [captions of a window]); all float32."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    mean: Tensor
    var: Tensor


def parameters(*tensors: Tensor) -> Parameters:
    return Parameters(*(_launch.aligned(x.float()) for x in tensors))


def filtered(
    given: Parameters, x: Rows, to: Rows, start: Tensor, images: int, captions: slice, training: bool, eps: float,
    end: End | None = None,
) -> None:  # fmt: skip
    """Write z of every pair into rows of S or, given `end`, its result into single values."""
    S = len(given.weight)
    tile = _tiles.filtered(x.data.dtype, _launch.arch(x.data.device))
    groups = _launch.blocks(captions.stop - captions.start, tile["CAPTIONS"])
    _filter[(images * groups,)](
        x.data, *given, start, to.data, *(end[:2] if end else (given.bias, given.bias)),
        groups, captions.start, captions.stop, x.first, x.rows, x.origin, to.first, to.rows, to.origin, eps,
        S=S, PADDED=_launch.power_of_two(S), TRAINING=training, SCORE=end is not None,
        LOGIT=end is not None and end.logit, **tile,
    )  # fmt: skip


def significances(given: Parameters, nodes: Tensor, rows: slice) -> Tensor:
    """a [I, rows] float32 of some rows of nodes [I, M, S]."""
    (I, M, S), count = nodes.shape, rows.stop - rows.start
    tile = _tiles.filter_significances(nodes.dtype, _launch.arch(nodes.device))
    a = torch.empty(I, count, dtype=torch.float32, device=nodes.device)
    blocks = _launch.blocks(count, tile["BLOCK_R"])
    _significances[(I * blocks,)](
        nodes, given.weight, given.bias, a, blocks, count, M, rows.start, S=S, PADDED=_launch.power_of_two(S), **tile
    )
    return a


def moments(
    a: Tensor, start: Tensor, captions: slice, origin: int, eps: float,
    h: Tensor | None = None, mean: Tensor | None = None, var: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and biased variance per caption of a [I, rows]; given `h` = d h, the means of d h and of a^ d h.

    `origin`: the packed node that is row 0 of a.
    """
    tile = _tiles.filter_moments(a.dtype, _launch.arch(a.device))
    one, two = (torch.empty(captions.stop - captions.start, dtype=torch.float32, device=a.device) for _ in range(2))
    _moments[(len(one),)](
        a, a if h is None else h, start, one if mean is None else mean, one if var is None else var, one, two,
        captions.start, *a.shape, origin, eps, BACKWARD=h is not None, **tile,
    )  # fmt: skip
    return one, two


def _groups(nodes: Tensor, captions: slice) -> tuple[int, _tiles.Tile]:
    tile = _tiles.filter_back(nodes.dtype, _launch.arch(nodes.device))
    return _launch.blocks(captions.stop - captions.start, tile["CAPTIONS"]), tile


def images_at_once(nodes: Tensor, captions: slice, most: int) -> int:
    """How many images to take at a time, so that the programs' partial gradients fit `most` bytes."""
    return max(1, most // (_groups(nodes, captions)[0] * 4 * (nodes.shape[2] + 3)))


def d_arguments(
    given: Parameters, nodes: Tensor, grad: Tensor, start: Tensor, captions: slice, origin: int, eps: float, h: Tensor
) -> None:
    """Training: write d h of all images into h [I, rows], whose row 0 is packed node `origin`."""
    (I, M, S), (groups, tile) = nodes.shape, _groups(nodes, captions)
    none = given.bias
    _filter_back[(I * groups,)](
        nodes, *given, start, grad, h, none, none, nodes, none,
        groups, captions.start, captions.stop, grad.shape[1], 0, M, h.shape[1], origin, eps,
        S=S, PADDED=_launch.power_of_two(S), TRAINING=True, SUMS=True, **tile,
    )  # fmt: skip


def backward(
    given: Parameters, nodes: Tensor, grad: Tensor, start: Tensor, captions: slice, images: slice, training: bool,
    eps: float, means: tuple[Tensor, Tensor], d_nodes: Tensor,
) -> Tensor:  # fmt: skip
    """Write these images' and captions' part of d_nodes; return d w, d b, d gamma, d delta: [S + 3] float64."""
    (_, M, S), (groups, tile) = nodes.shape, _groups(nodes, captions)
    programs = (images.stop - images.start) * groups
    part = torch.empty(programs, S + 3, dtype=torch.float32, device=nodes.device)
    _filter_back[(programs,)](
        nodes, *given, start, grad, given.bias, *means, d_nodes, part,
        groups, captions.start, captions.stop, grad.shape[1], images.start, M, 0, 0, eps,
        S=S, PADDED=_launch.power_of_two(S), TRAINING=training, SUMS=False, **tile,
    )  # fmt: skip
    return part.sum(0, dtype=torch.float64)


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    shape = dict(S=256, PADDED=256)
    given = "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i32"
    single = torch.float32
    for backward in (False, True):
        types = "*fp32 *fp32 *i32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32 fp32"
        tile = _tiles.filter_moments(single, arch)
        yield _tiles.Compilation(_moments, types, dict(BACKWARD=backward), tile)
    for dtype, t in _tiles.NAMES.items():
        for training, score, logit in (False,) * 3, (True, False, False), (False, True, False), (False, True, True):
            end = f"*{t} *{t}" if score else "*fp32 *fp32"
            types = f"*{t} {given} *{t} {end}" + " i32" * 9 + " fp32"
            constants = shape | dict(TRAINING=training, SCORE=score, LOGIT=logit)
            yield _tiles.Compilation(_filter, types, constants, _tiles.filtered(dtype, arch))
        types = f"*{t} *fp32 *fp32 *fp32 i32 i32 i32 i32"
        yield _tiles.Compilation(_significances, types, shape, _tiles.filter_significances(dtype, arch))
        for training, sums in (False, False), (True, True), (True, False):
            types = f"*{t} {given} *{t} *fp32 *fp32 *fp32 *{t} *fp32" + " i32" * 8 + " fp32"
            constants = shape | dict(TRAINING=training, SUMS=sums)
            yield _tiles.Compilation(_filter_back, types, constants, _tiles.filter_back(dtype, arch))
