"""What each launch of a Triton kernel of a forward pass moves and computes: one function for each kernel.

`traffic_triton` says what is counted and what is left out. Some of these kernels run in backward passes too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.traffic_counts import blocks


def kind(dtype: torch.dtype, precision: str) -> str:
    """The kind of a product of two tiles of `dtype`."""
    return precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def sizes(count: Tensor, sets: slice) -> Tensor:
    return count[sets].long()


def half(tensor: Tensor) -> int:
    """1 where an element is converted to or from float32, else 0."""
    return int(tensor.dtype != torch.float32)


def _affinity(a: Any) -> None:
    tiles = a.count.programs
    a.reads("query_ptr", a.queries * a.D, tiles * a.BLOCK_M * a.D, a.query_first, a.queries)
    a.reads("context_ptr", a.contexts * a.D, tiles * a.BLOCK_N * a.D, a.context_first, a.contexts)
    a.writes("out_ptr", a.queries * a.contexts)
    depth = blocks(a.D, a.BLOCK_K) * a.BLOCK_K
    a.count.dots(tiles, a.BLOCK_M, a.BLOCK_N, depth, kind(a.query_ptr.dtype, a.PRECISION))


def _gram(a: Any) -> None:
    sets = a.count.programs // a.chunks**2
    size = sizes(a.count_ptr, slice(a.set_first, a.set_first + sets))
    tiles = int((blocks(size, a.BLOCK_X) ** 2).sum())
    rows = int(size.sum())
    a.reads("row_ptr", rows * a.D, tiles * 2 * a.BLOCK_X * a.D, a.row_first, rows)
    a.writes("out_ptr", int((size**2).sum()))
    depth = blocks(a.D, a.BLOCK_K) * a.BLOCK_K
    a.count.dots(tiles, a.BLOCK_X, a.BLOCK_X, depth, kind(a.row_ptr.dtype, a.PRECISION))


def _lengths(a: Any) -> None:
    a.reads("row_ptr", a.rows * a.D, a.rows * a.D)
    a.writes("out_ptr", a.rows)
    a.count.vector = a.count.programs * a.BLOCK_M * a.BLOCK_K * (blocks(a.D, a.BLOCK_K) * (2 + half(a.row_ptr)) + 1)


def _query_norms(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    a.reads("logits_ptr", size.sum() * a.contexts, size.sum() * a.contexts)
    a.writes("out_ptr", a.sets * a.contexts)
    a.count.vector = padded(size, a.SETS, a.BLOCK_Q) * blocks(a.contexts, a.BLOCK_X) * a.BLOCK_X * 5


def padded(size: Tensor, sets: int, rows: int) -> int:
    """Rows that programs of `sets` sets go through, `rows` of each set at a time."""
    filled = torch.nn.functional.pad(size, (0, -len(size) % sets))
    return int((blocks(filled.view(-1, sets).amax(1), rows) * rows * sets).sum())


def _attend(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    tiles = blocks(a.queries, a.BLOCK_Q)
    parts = blocks(size, a.BLOCK_X) if not a.WHOLE else torch.ones_like(size)
    # A set of several tiles is read again to tell which contexts are kept and what these add up to, for each tile of
    # G's columns and with these, and to store e.
    rule = {"softmax": 0, "hard": 1, "threshold": 1}.get(a.WEIGHTS, 2) + int(a.MODE == "weights")
    through = parts + 1 if a.GRAM else 0 * parts + int(a.MODE == "backward")
    again = torch.where(parts == 1, 0, rule + through)
    passes = (1 + again) * size
    rows = tiles * a.BLOCK_Q
    contexts = int(size.sum())
    a.reads("logits_ptr", a.queries * contexts, rows * passes.sum())
    if a.NORM != "none":
        first, last = a.owner_ptr[[a.query_first, a.query_first + a.queries - 1]].tolist()
        a.reads("norm_ptr", (last - first + 1) * contexts, rows * passes.sum())
    if a.GRAM:
        a.reads("gram_ptr", (size**2).sum(), tiles * (size**2 + size).sum())
        products = tiles * int((parts**2).sum())
        a.count.dots(products, a.BLOCK_Q, a.BLOCK_X, a.BLOCK_X, kind(torch.float32, a.PRECISION))
    if a.MODE == "score" and a.GRAM:
        a.reads("length_ptr", a.queries, rows * a.sets, a.query_first, a.queries)
    if a.MODE != "score":
        a.writes("alpha_ptr", a.queries * contexts)
    if a.MODE == "backward":
        a.writes("dot_ptr", a.queries * a.sets)
        if a.GRAM:
            a.writes("product_ptr", a.queries * contexts)
    if a.GRAM or a.MODE != "backward":
        a.writes("out_ptr", a.queries * a.sets)
    each = 15 if a.MODE == "backward" else 12
    a.count.vector = rows * a.BLOCK_X * int((parts * (each + 6 * again)).sum())


def _pool(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    a.reads("r_ptr", size.sum() * a.columns, size.sum() * a.columns)
    a.writes("out_ptr", a.sets * a.columns)
    a.count.vector = padded(size, a.SETS, a.BLOCK_Q) * blocks(a.columns, a.BLOCK_B) * a.BLOCK_B * 5


def _project(a: Any) -> None:
    size = sizes(a.size_ptr, slice(a.set_first, a.set_first + a.sets))
    tiles, contexts = blocks(a.queries, a.BLOCK_Q), int(size.sum())
    outs = blocks(a.S, a.BLOCK_S)
    passes = outs if outs == 1 else 2 * outs  # over D: a wide S takes two sweeps
    steps, rows = blocks(a.D, a.BLOCK_K), tiles * a.BLOCK_Q
    which, single = kind(a.query_ptr.dtype, a.PRECISION), half(a.query_ptr)
    chunks = torch.full_like(size, blocks(a.ROWS, a.BLOCK_X)) if a.WHOLE else blocks(size, a.BLOCK_X)
    if not a.GLOBAL:
        again = 1 if a.WHOLE and a.BLOCK_X == a.ROWS else passes * steps
        a.reads("alpha_ptr", a.queries * contexts, rows * contexts * again)
        a.reads("inverse_ptr", a.queries * a.sets, rows * a.sets)
        a.count.dots(tiles * passes * steps * int(chunks.sum()), a.BLOCK_Q, a.BLOCK_K, a.BLOCK_X, which)
    loaded = a.sets if a.GLOBAL else int(chunks.sum()) * a.BLOCK_X
    first = int(a.start_ptr[a.set_first])
    a.reads("context_ptr", contexts * a.D, tiles * passes * loaded * a.D, first, contexts)
    a.reads("query_ptr", a.queries * a.D, rows * a.sets * passes * a.D, a.query_first, a.queries)
    programs = a.count.programs
    a.reads("weight_ptr", a.S * a.D, programs * passes * a.BLOCK_S * a.D)
    a.reads("bias_ptr", a.S, programs * passes * a.BLOCK_S)
    if a.BACKWARD:
        row = torch.arange(a.query_first, a.query_first + a.queries)
        owner = a.owner_ptr[row].long()
        elements = int((row - a.query_start_ptr[owner] < a.query_size_ptr[owner]).sum()) * a.sets * a.S
        a.reads("out_ptr", elements, min(2, outs) * elements, a.set_first, a.query_first)
        a.writes("gradient_ptr", a.queries * a.sets * a.S)
    else:
        a.writes("out_ptr", a.queries * a.sets * a.S)
    a.count.dots(programs * passes * steps, a.BLOCK_Q, a.BLOCK_S, a.BLOCK_K, which)
    each = passes * (steps * a.BLOCK_K * (3 + 2 * single) + a.BLOCK_S)
    each += outs * a.BLOCK_S * (3 + single + 5 * int(a.BACKWARD))
    a.count.vector = programs * a.BLOCK_Q * each


def _step(a: Any) -> None:
    parts = a.BLOCK_N // a.BLOCK_Q
    programs = a.count.programs
    images = programs // parts // a.tiles
    real = int((a.row_ptr[a.slot : a.slot + a.tiles * a.BLOCK_N] >= 0).sum()) * images
    sizes = a.BLOCK_Y, a.BLOCK_K, a.BLOCK_C, a.BLOCK_O
    wide, steps, columns, outs = (blocks(a.PADDED, size) for size in sizes)
    queries = 1 if steps == 1 else wide  # how often a tile's own rows are read
    a.reads("x_ptr", real * a.S, real * a.S * (queries + parts + outs * parts), a.slot)
    for name in ("ask_ptr", "value_ptr"):
        a.reads(name, a.S**2, programs * a.S**2)
    for name in ("shift_ptr", "bias_ptr"):
        a.reads(name, a.S, programs * a.S)
    a.writes("y_ptr", real * a.S, a.slot)
    which = kind(a.x_ptr.dtype, a.PRECISION)
    a.count.dots(programs * wide * steps, a.BLOCK_Q, a.BLOCK_Y, a.BLOCK_K, which)
    a.count.dots(programs * wide, a.BLOCK_Q, a.BLOCK_N, a.BLOCK_Y, which)
    a.count.dots(programs * columns * outs, a.BLOCK_Q, a.BLOCK_N, a.BLOCK_C, which)
    a.count.dots(programs * columns * outs, a.BLOCK_Q, a.BLOCK_O, a.BLOCK_C, which)
    single = half(a.x_ptr)
    a.count.vector = programs * a.BLOCK_Q * (a.PADDED * (3 + outs + (2 + outs) * single) + a.BLOCK_N * (6 + single))


def images_and_captions(a: Any) -> tuple[int, int, int]:
    """Images, captions, and nodes of all images that a launch over images and groups of captions goes through."""
    captions = a.last - a.first
    images = a.count.programs // a.groups
    return images, captions, images * int(a.start_ptr[a.last] - a.start_ptr[a.first])


def _read(a: Any) -> None:
    images, captions, nodes = images_and_captions(a)
    pairs = images * captions * a.S
    a.reads("asked_ptr", pairs, pairs)
    a.reads("x_ptr", nodes * a.S, nodes * a.S)
    a.writes("z_ptr", pairs)
    chunks = blocks(a.start_ptr[a.first : a.last + 1].diff().long(), a.BLOCK_R).sum()
    a.count.vector = a.PADDED * images * int(chunks) * (a.BLOCK_R * (4 + half(a.x_ptr)) + 2)


def _dense(a: Any) -> None:
    outs, steps, programs = blocks(a.PADDED, a.BLOCK_O), blocks(a.PADDED, a.BLOCK_K), a.count.programs
    part = (a.first,) if a.FIRST_NODES else ()
    a.reads("x_ptr", a.pairs * a.S, outs * a.pairs * a.S, *part)
    a.reads("weight_ptr", a.S**2, programs * a.S**2)
    a.reads("bias_ptr", a.S, programs * a.S)
    if a.SCORE:
        a.reads("score_weight_ptr", a.S, programs * a.S)
        a.reads("score_bias_ptr", 1, programs)
    a.writes("y_ptr", a.pairs if a.SCORE else a.pairs * a.S)
    a.count.dots(programs * outs * steps, a.BLOCK_P, a.BLOCK_O, a.BLOCK_K, kind(a.x_ptr.dtype, a.PRECISION))
    last = 2 if a.SCORE else half(a.y_ptr)
    a.count.vector = programs * a.BLOCK_P * a.PADDED * (1 + int(a.RELU) + last)


def _filter(a: Any) -> None:
    images, captions, nodes = images_and_captions(a)
    pairs = images * captions
    a.reads("x_ptr", nodes * a.S, nodes * a.S)
    a.reads("weight_ptr", a.S, a.count.programs * a.S)
    for name in ("bias_ptr", "norm_weight_ptr", "norm_bias_ptr"):
        a.reads(name, 1, pairs)
    for name in ("mean_ptr", "var_ptr"):
        a.reads(name, captions if a.TRAINING else 1, pairs)
    if a.SCORE:
        a.reads("score_weight_ptr", a.S, pairs * a.S)
        a.reads("score_bias_ptr", 1, pairs)
    a.writes("y_ptr", pairs if a.SCORE else pairs * a.S)
    chunks = blocks(a.start_ptr[a.first : a.last + 1].diff().long(), a.BLOCK_R).sum()
    a.count.vector = a.PADDED * images * (int(chunks) * (a.BLOCK_R * (4 + half(a.x_ptr)) + 1) + captions * 6)


COUNTS: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (
        _affinity, _gram, _lengths, _query_norms, _attend, _pool, _project, _step, _read, _dense, _filter,
    )
}  # fmt: skip
