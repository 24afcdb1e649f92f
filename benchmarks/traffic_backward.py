"""What each launch of a Triton kernel of backward passes alone moves and computes: one function for each kernel.

`traffic_triton` says what is counted and what is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.traffic_counts import blocks
from benchmarks.traffic_forward import half, images_and_captions, kind, padded, sizes


def _pool_backward(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    passes, queries = 1 + int(a.POOL in ("lse", "max")), int(size.sum())
    chunks, elements = blocks(a.columns, a.BLOCK_B), queries * a.columns
    a.reads("dot_ptr", elements, passes * elements)
    if a.GRAM:
        a.reads("square_ptr", elements, passes * elements)
        a.reads("length_ptr", queries, passes * chunks * queries, a.set_first, a.sets)
    if a.POOL == "smoothed_negative":
        a.reads("n_ptr", elements, elements)
    a.reads("grad_ptr", a.sets * a.columns, a.sets * a.columns)
    for name in ("w0_ptr", "w1_ptr", "w2_ptr", "wq_ptr")[: 4 if a.GRAM else 2]:
        a.writes(name, elements)
    each = (8 if passes == 2 else 0) + (24 if a.GRAM else 5)
    a.count.vector = padded(size, a.SETS, a.BLOCK_Q) * chunks * a.BLOCK_B * each


def _logit_gradient(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    row = torch.arange(a.context_first, a.context_first + a.contexts)
    owner = a.context_owner_ptr[row].long()
    counted = row - a.context_start_ptr[owner] < a.context_size_ptr[owner]
    chunk = ((row - a.context_first) // a.BLOCK_X)[counted]
    passes, queries, contexts = 1 + int(a.NORM != "none"), int(size.sum()), int(counted.sum())
    elements = queries * contexts
    names = ["logit_ptr", "alpha_ptr", *["f_ptr"] * (not a.DIRECT), *["product_ptr"] * a.GRAM]
    for name in names:
        a.reads(name, elements, passes * elements)
    # The contexts of a set in a row of a tile have one number together.
    once = len(torch.unique(torch.stack([chunk, owner[counted]]), dim=1).T)
    for name in ("w0_ptr", "w1_ptr", "w2_ptr")[: 2 + int(a.GRAM)]:
        a.reads(name, queries * len(owner[counted].unique()), passes * queries * once)
    if a.NORM != "none":
        a.reads("norm_ptr", a.sets * contexts, a.sets * contexts)
    a.writes("out_ptr", elements)
    each = passes * (5 + 2 * int(a.GRAM) + 3 * int(a.NORM != "none") + 2 * int(a.CLIP)) + 2 * int(a.DIRECT) + 4
    a.count.vector = padded(size, a.SETS, a.BLOCK_Q) * blocks(a.contexts, a.BLOCK_X) * a.BLOCK_X * each


def _tiled(a: Any, parts: int) -> tuple[Tensor, Tensor]:
    """Rows of a launch's sets, and their tiles, where `parts` programs share a set."""
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.count.programs // parts))
    return size, blocks(size, a.BLOCK_X)


def _gram_gradient(a: Any) -> None:
    size, tiles = _tiled(a, a.chunks**2)
    number = int((tiles**2).sum())
    a.reads("alpha_ptr", a.queries * size.sum(), a.queries * (2 * tiles * size).sum())
    a.reads("w2_ptr", a.queries * (size > 0).sum(), a.queries * number)
    a.reads("out_ptr", (size**2).sum(), (size**2).sum())
    a.writes("out_ptr", (size**2).sum())
    products = number * blocks(a.queries, a.BLOCK_Q)
    a.count.dots(products, a.BLOCK_X, a.BLOCK_X, a.BLOCK_Q, kind(torch.float32, a.PRECISION))
    a.count.vector = products * a.BLOCK_Q * a.BLOCK_X + number * a.BLOCK_X**2


def _apply(a: Any) -> None:
    columns = blocks(a.D, a.BLOCK_K)
    size, tiles = _tiled(a, a.chunks * columns)
    rows, first = int(size.sum()), int(a.start_ptr[a.set_first])
    a.reads("m_ptr", (size**2).sum(), columns * (size**2).sum())
    a.reads("row_ptr", rows * a.D, (tiles * size).sum() * a.D, first, rows)
    a.reads("out_ptr", rows * a.D, rows * a.D, first, rows)
    a.writes("out_ptr", rows * a.D, first, rows)
    products = int((tiles**2).sum()) * columns
    a.count.dots(products, a.BLOCK_X, a.BLOCK_K, a.BLOCK_X, kind(torch.float32, a.PRECISION))
    a.count.vector = columns * a.BLOCK_X * a.BLOCK_K * int((tiles**2 * half(a.row_ptr) + tiles).sum())


def _difference_gradient(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    tiles, columns, contexts = blocks(a.queries, a.BLOCK_Q), blocks(a.D, a.BLOCK_K), int(size.sum())
    chunks = a.sets if a.WHOLE else int(blocks(size, a.BLOCK_X).sum())
    rows, programs = tiles * a.BLOCK_Q, a.count.programs
    a.reads("alpha_ptr", a.queries * contexts, rows * columns * contexts)
    a.reads("square_ptr", a.queries * a.sets, rows * columns * a.sets)
    a.reads("dy_ptr", a.queries * a.sets * a.S, rows * columns * a.sets * a.S)
    a.reads("query_ptr", a.queries * a.D, rows * a.sets * a.D, a.query_first, a.queries)
    first = int(a.start_ptr[a.set_first])
    a.reads("context_ptr", contexts * a.D, tiles * chunks * a.BLOCK_X * a.D, first, contexts)
    a.reads("weight_ptr", a.S * a.D, tiles * a.sets * a.S * a.D)
    for name in ("du_ptr", "squares_ptr"):
        a.writes(name, a.queries * a.sets * a.D)
    which = kind(a.context_ptr.dtype, a.PRECISION)
    a.count.dots(tiles * columns * chunks, a.BLOCK_Q, a.BLOCK_K, a.BLOCK_X, which)
    outs = blocks(a.S, a.BLOCK_S)
    a.count.dots(programs * outs, a.BLOCK_Q, a.BLOCK_K, a.BLOCK_S, kind(torch.float32, a.PRECISION))
    each = a.BLOCK_Q * (5 + half(a.query_ptr)) + outs * a.BLOCK_S * half(a.weight_ptr)
    a.count.vector = programs * a.BLOCK_K * each


def _context_products(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    tiles, chunks, contexts = blocks(a.queries, a.BLOCK_Q), int(blocks(size, a.BLOCK_X).sum()), int(size.sum())
    rows, first = tiles * a.BLOCK_Q, int(a.start_ptr[a.set_first])
    pairs = a.queries * a.sets
    a.reads("row_ptr", pairs * a.D, rows * chunks * a.D)
    a.reads("context_ptr", contexts * a.D, tiles * chunks * a.BLOCK_X * a.D, first, contexts)
    if a.SUMS != "none":
        a.reads("alpha_ptr", a.queries * contexts, rows * contexts)
    if a.SUMS == "unit":
        a.reads("square_ptr", pairs, rows * a.sets)
    a.writes("f_ptr", a.queries * contexts)
    for name in ("w0_ptr", "w1_ptr", "w2_ptr")[: {"none": 0, "weighted": 1, "unit": 3}[a.SUMS]]:
        a.writes(name, pairs)
    steps = blocks(a.D, a.BLOCK_K)
    a.count.dots(tiles * chunks * steps, a.BLOCK_Q, a.BLOCK_X, a.BLOCK_K, kind(a.row_ptr.dtype, a.PRECISION))
    converted = int(a.context_ptr.dtype != a.row_ptr.dtype)
    each = a.BLOCK_Q * 2 * int(a.SUMS != "none") + converted * steps * a.BLOCK_K
    a.count.vector = tiles * (chunks * a.BLOCK_X * each + a.sets * a.BLOCK_Q * 8 * int(a.SUMS == "unit"))


def _weighted_sum(a: Any) -> None:
    columns = blocks(a.D, a.BLOCK_K)
    size, tiles = _tiled(a, a.chunks * columns)
    rows, first, number = int(size.sum()), int(a.start_ptr[a.set_first]), int(tiles.sum())
    a.reads("alpha_ptr", a.queries * rows, columns * a.queries * rows)
    if a.SCALED:
        a.reads("w1_ptr", a.queries * (size > 0).sum(), columns * number * a.queries)
    a.reads("row_ptr", a.queries * (size > 0).sum() * a.D, number * a.queries * a.D)
    a.reads("out_ptr", rows * a.D, rows * a.D, first, rows)
    a.writes("out_ptr", rows * a.D, first, rows)
    products = number * columns * blocks(a.queries, a.BLOCK_Q)
    a.count.dots(products, a.BLOCK_X, a.BLOCK_K, a.BLOCK_Q, kind(torch.float32, a.PRECISION))
    each = a.BLOCK_Q * (a.BLOCK_X * int(a.SCALED) + a.BLOCK_K * half(a.row_ptr))
    a.count.vector = products * each + number * columns * a.BLOCK_X * a.BLOCK_K


def _tiles_of_nodes(a: Any) -> tuple[int, int]:
    """Programs that share a tile, and nodes of all images in a launch's tiles."""
    parts = a.BLOCK_N // a.BLOCK_M
    images = a.count.programs // parts // a.tiles
    return parts, int((a.row_ptr[a.slot : a.slot + a.tiles * a.BLOCK_N] >= 0).sum()) * images


def _edges(a: Any) -> None:
    """Products of two kinds of rows with the nodes, then of E and of dL, each [BLOCK_M, BLOCK_N], with rows."""
    which = kind(a.x_ptr.dtype, a.PRECISION)
    a.count.dots(4 * a.count.programs, a.BLOCK_M, a.BLOCK_N, a.PADDED, which)


def _step_back_queries(a: Any) -> None:
    parts, nodes = _tiles_of_nodes(a)
    a.reads("x_ptr", nodes * a.S, 2 * parts * nodes * a.S, a.slot)
    for name in ("y_ptr", "dz_ptr"):
        a.reads(name, nodes * a.S, nodes * a.S, a.slot)
    for name in ("z_ptr", "dy_ptr"):
        a.writes(name, nodes * a.S, a.slot)
    for name in ("top_ptr", "total_ptr", "mean_ptr"):
        a.writes(name, nodes, a.slot)
    _edges(a)
    a.count.vector = a.count.programs * a.BLOCK_M * (a.BLOCK_N * (9 + 2 * half(a.x_ptr)) + 2 * a.PADDED * half(a.x_ptr))


def _step_back_keys(a: Any) -> None:
    parts, nodes = _tiles_of_nodes(a)
    a.reads("x_ptr", nodes * a.S, nodes * a.S, a.slot)
    for name in ("y_ptr", "dz_ptr"):
        a.reads(name, nodes * a.S, 2 * parts * nodes * a.S, a.slot)
    for name in ("top_ptr", "total_ptr", "mean_ptr"):
        a.reads(name, nodes, parts * nodes, a.slot)
    a.writes("dx_ptr", nodes * a.S, a.slot)
    _edges(a)
    a.count.vector = a.count.programs * a.BLOCK_M * (a.BLOCK_N * (5 + 2 * half(a.x_ptr)) + a.PADDED * half(a.x_ptr))


def _read_back(a: Any) -> None:
    images, captions, nodes = images_and_captions(a)
    pairs = images * captions * a.S
    a.reads("x_ptr", nodes * a.S, 2 * nodes * a.S)
    for name in ("asked_ptr", "dz_ptr"):
        a.reads(name, pairs, pairs)
    a.writes("dx_ptr", nodes * a.S)
    a.writes("d_asked_ptr", pairs)
    chunks = _chunks(a)
    each = a.BLOCK_R * (13 + 3 * half(a.x_ptr)) + 1
    a.count.vector = a.PADDED * images * (chunks * each + captions * 2 * half(a.x_ptr))


def _chunks(a: Any) -> int:
    """Blocks of rows that the nodes of a launch's captions take."""
    return int(blocks(a.start_ptr[a.first : a.last + 1].diff().long(), a.BLOCK_R).sum())


def _significances(a: Any) -> None:
    programs = a.count.programs
    rows = programs // a.blocks * a.rows
    a.reads("x_ptr", rows * a.S, rows * a.S, a.x_origin, rows)
    a.reads("weight_ptr", a.S, programs * a.S)
    a.reads("bias_ptr", 1, programs)
    a.writes("a_ptr", rows)
    a.count.vector = programs * a.BLOCK_R * (a.PADDED * (2 + half(a.x_ptr)) + 1)


def _moments(a: Any) -> None:
    captions = a.count.programs
    size = a.start_ptr[a.first : a.first + captions + 1].diff().long()
    elements = a.images * int(size.sum())
    a.reads("a_ptr", elements, elements * (2 - int(a.BACKWARD)))
    if a.BACKWARD:
        a.reads("h_ptr", elements, elements)
        for name in ("mean_ptr", "var_ptr"):
            a.reads(name, captions, captions)
    for name in ("one_ptr", "two_ptr"):
        a.writes(name, captions)
    tiles = blocks(a.images, a.BLOCK_I) * int(blocks(size, a.BLOCK_R).sum())
    a.count.vector = a.BLOCK_I * a.BLOCK_R * (tiles * (5 if a.BACKWARD else 4) + captions * 2)


def _filter_back(a: Any) -> None:
    images, captions, nodes = images_and_captions(a)
    pairs, programs = images * captions, a.count.programs
    a.reads("x_ptr", nodes * a.S, 2 * nodes * a.S, a.image_first, images, a.first)
    a.reads("weight_ptr", a.S, programs * a.S)
    for name in ("bias_ptr", "norm_weight_ptr", "norm_bias_ptr"):
        a.reads(name, 1, pairs)
    of_captions = ["mean_ptr", "var_ptr"] + ["mean_h_ptr", "mean_ah_ptr"] * int(a.TRAINING and not a.SUMS)
    for name in of_captions:
        a.reads(name, captions if a.TRAINING else 1, pairs)
    a.reads("dz_ptr", pairs * a.S, pairs * a.S, a.image_first, images, a.first)
    if a.SUMS:
        a.writes("h_ptr", nodes)
    else:
        a.writes("dx_ptr", nodes * a.S, a.image_first, images, a.first)
        a.writes("part_ptr", programs * (a.S + 3))
    chunks, single = _chunks(a), half(a.x_ptr)
    each = a.BLOCK_R * (8 + 2 * single if a.SUMS else 13 + 3 * single)
    a.count.vector = a.PADDED * images * (chunks * each + captions * (12 + single))


COUNTS: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (
        _pool_backward, _logit_gradient, _gram_gradient, _apply, _difference_gradient, _context_products,
        _weighted_sum, _step_back_queries, _step_back_keys, _read_back, _significances, _moments, _filter_back,
    )
}  # fmt: skip
