"""Graph reasoning, (1) to (3) of `ops/similarity_graph.py`, on tiles of nodes X [BLOCK_N, S] that hold whole captions.

    Y = X M + u,   E = softmax over a caption's nodes of Y X^T,   X' = relu((E X) Wr^T + br)    `_step`
    the last step, at the global nodes only: Y, then E X, then X' or the score           `_dense`, `_read`, `_dense`

A caption takes 16, 32, 64 or 128 rows of a tile (`packing.node_plan`), so that its results do not depend on its
neighbours: packed without gaps, its sums would reach the matrix units in an order that depends on its position. COCO's
captions have 14.3 nodes (<start>, <end> and the global node included) and fill 78 % of the rows, in tiles of 64 and of
128 rows; without gaps 89 and 95 %. The products with E are a fifth of a step's operations in tiles of 64 rows
and a third in tiles of 128, of which 18 and 9 % lie inside captions. But every tile reads M and Wr, which are two
thirds of what a tile of 64 rows reads: `_tiles.node_tiles` says where 128 rows fit registers and shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from itm_fast._folding import folded_exactly
from itm_fast._workspace import scratch_bytes
from itm_fast.packing import NodePlan, Window, node_plan, spans

from . import _launch, _tiles
from ._tl import NEVER, finite, relu

WINDOW = 1 << 14  # the most nodes of one image in a block; a power of two


@triton.jit
def _sum_up(
    edges, share, keys, key_real, value_ptr, bias_ptr, results, query_real,
    S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr, SPOILED: tl.constexpr,
):  # fmt: skip
    """(2): store X' of the queries. SPOILED: NaN and infinite keys count as 0."""
    dtype = edges.dtype
    for o in range(0, PADDED, BLOCK_O):
        outs = o + tl.arange(0, BLOCK_O)
        total = tl.zeros([BLOCK_Q, BLOCK_O], tl.float32)
        for c in range(0, PADDED, BLOCK_C):
            cols = c + tl.arange(0, BLOCK_C)
            x = tl.load(keys + cols, mask=key_real & (cols < S), other=0.0)
            if SPOILED:
                x = finite(x)
            z = tl.dot(edges, x, input_precision=PRECISION) * share[:, None]
            w = tl.load(value_ptr + outs[:, None] * S + cols, mask=(outs < S)[:, None] & (cols < S), other=0.0)
            total = tl.dot(z.to(dtype), tl.trans(w), total, input_precision=PRECISION)
        total += tl.load(bias_ptr + outs, mask=outs < S, other=0.0)[None, :]
        tl.store(results + outs, relu(total).to(dtype), mask=query_real & (outs < S))


@triton.jit(do_not_specialize=["tiles", "slot", "x_first", "x_image", "x_origin", "y_image", "y_origin"])
def _step(
    x_ptr, ask_ptr, shift_ptr, value_ptr, bias_ptr, y_ptr, row_ptr, owner_ptr,
    tiles, slot, x_first, x_image, x_origin, y_image, y_origin,
    S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step: X' of all nodes into y. `ask_ptr` M^T, `value_ptr` Wr [S, S]; `shift_ptr` u, `bias_ptr` br [S].

    (x_first, x_image, x_origin), (y_...): fields of `Rows`. `row_ptr`, `owner_ptr`: slots of `NodePlan` from `slot` on.
    One program: BLOCK_Q rows of a tile of an image. Grid: images x tiles x parts.
    """
    program, parts = tl.program_id(0).to(tl.int64), BLOCK_N // BLOCK_Q
    image, tile, part = program // parts // tiles, program // parts % tiles, program % parts
    key_slot = slot + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    query_slot = slot + tile * BLOCK_N + part * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key, query = tl.load(row_ptr + key_slot).to(tl.int64), tl.load(row_ptr + query_slot).to(tl.int64)
    key_real, query_real = (key >= 0)[:, None], (query >= 0)[:, None]  # slots that hold a node
    x_ptr += ((x_first + image) * x_image - x_origin) * S
    keys, queries = x_ptr + key[:, None] * S, x_ptr + query[:, None] * S
    dtype = x_ptr.dtype.element_ty

    # Y X^T, BLOCK_Y columns of Y at a time. Queries of at most BLOCK_K columns are read once, for all columns of Y.
    k = tl.arange(0, BLOCK_K)
    if PADDED == BLOCK_K:
        kept = tl.load(queries + k, mask=query_real & (k < S), other=0.0)
    logits = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for y in range(0, PADDED, BLOCK_Y):
        cols = y + tl.arange(0, BLOCK_Y)
        asked = tl.zeros([BLOCK_Q, BLOCK_Y], tl.float32)
        for start in range(0, PADDED, BLOCK_K):
            if PADDED == BLOCK_K:
                x = kept
            else:
                x = tl.load(queries + start + k, mask=query_real & (start + k < S), other=0.0)
            at = ask_ptr + cols[:, None] * S + start + k
            m = tl.load(at, mask=(cols < S)[:, None] & (start + k < S), other=0.0)
            asked = tl.dot(x, tl.trans(m), asked, input_precision=PRECISION)
        asked += tl.load(shift_ptr + cols, mask=cols < S, other=0.0)[None, :]
        x = tl.load(keys + cols, mask=key_real & (cols < S), other=0.0)  # [BLOCK_N, BLOCK_Y]
        logits = tl.dot(asked.to(dtype), tl.trans(x), logits, input_precision=PRECISION)

    # Captions share a tile, and 0 * NaN is NaN: if a logit is not finite, `_sum_up` reads bad values as 0. The caption
    # that holds them still gets NaN, through its own softmax weights.
    spoiled = tl.sum(logits - logits) != 0
    # Empty slots form a caption of zeros, so every row has a key.
    inside = tl.load(owner_ptr + query_slot)[:, None] == tl.load(owner_ptr + key_slot)[None, :]
    logits = tl.where(inside, logits, NEVER)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    share = 1.0 / tl.sum(weights, 1)
    edges = weights.to(dtype)
    results = y_ptr + (image * y_image + query - y_origin)[:, None] * S
    if spoiled:
        _sum_up(
            edges, share, keys, key_real, value_ptr, bias_ptr, results, query_real,
            S, BLOCK_Q, BLOCK_C, BLOCK_O, PADDED, PRECISION, True,
        )  # fmt: skip
    else:
        _sum_up(
            edges, share, keys, key_real, value_ptr, bias_ptr, results, query_real,
            S, BLOCK_Q, BLOCK_C, BLOCK_O, PADDED, PRECISION, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["groups", "first", "last", "x_first", "x_image", "x_origin"])
def _read(
    x_ptr, asked_ptr, start_ptr, z_ptr, groups, first, last, x_first, x_image, x_origin,
    S: tl.constexpr, CAPTIONS: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """E X at the global nodes: z [images, captions, S] from x and their Y, `asked_ptr` [images, captions, S] float32.

    Captions of any length. One program: an image with CAPTIONS captions. Grid: images x groups.
    """
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    s = tl.arange(0, PADDED)
    x_ptr += (x_first + image) * x_image * S
    begin = first + group * CAPTIONS
    for t in range(begin, tl.minimum(begin + CAPTIONS, last)):
        pair = image * (last - first) + t - first
        asked = tl.load(asked_ptr + pair * S + s, mask=s < S, other=0.0)  # [PADDED]
        start, stop = tl.load(start_ptr + t), tl.load(start_ptr + t + 1)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        z = tl.zeros([PADDED], tl.float32)
        for at in range(start, stop, BLOCK_R):
            row = at + tl.arange(0, BLOCK_R)
            offset = (row - x_origin).to(tl.int64)[:, None] * S + s
            x = tl.load(x_ptr + offset, mask=(row < stop)[:, None] & (s < S), other=0.0).to(tl.float32)
            logit = tl.where(row < stop, tl.sum(x * asked[None, :], 1), float("-inf"))
            higher = tl.maximum(top, tl.max(logit, 0))
            shrunk = tl.exp(top - higher)
            weight = tl.exp(logit - higher)
            total = total * shrunk + tl.sum(weight, 0)
            z = z * shrunk + tl.sum(x * weight[:, None], 0)
            top = higher
        tl.store(z_ptr + pair * S + s, (z / total).to(z_ptr.dtype.element_ty), mask=s < S)


@triton.jit(
    do_not_specialize=[
        "pairs", "captions", "first", "x_first", "x_image", "x_origin", "y_first", "y_image", "y_origin",
    ]
)  # fmt: skip
def _dense(
    x_ptr, start_ptr, weight_ptr, bias_ptr, y_ptr, score_weight_ptr, score_bias_ptr,
    pairs, captions, first, x_first, x_image, x_origin, y_first, y_image, y_origin,
    S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, PADDED: tl.constexpr,
    FIRST_NODES: tl.constexpr, RELU: tl.constexpr, SCORE: tl.constexpr, LOGIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x W^T + b per pair, then relu with RELU, then sigmoid(w_e . y + b_e) with SCORE, as single values;
    with LOGIT without the sigmoid.

    x: a row per pair or, with FIRST_NODES, the pairs' global nodes. One program: BLOCK_P pairs. Grid: blocks of pairs.
    """
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    real = pair < pairs
    image, caption = pair // captions, first + pair % captions
    x_row = (x_first + image) * x_image - x_origin
    x_row += tl.load(start_ptr + caption, mask=real, other=0) if FIRST_NODES else caption
    y_row = (y_first + image) * y_image + caption - y_origin
    score = tl.zeros([BLOCK_P], tl.float32)
    for o in range(0, PADDED, BLOCK_O):
        outs = o + tl.arange(0, BLOCK_O)
        total = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for start in range(0, PADDED, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + x_row[:, None] * S + k, mask=real[:, None] & (k < S), other=0.0)
            w = tl.load(weight_ptr + outs[:, None] * S + k, mask=(outs < S)[:, None] & (k < S), other=0.0)
            total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        total += tl.load(bias_ptr + outs, mask=outs < S, other=0.0)[None, :]
        if RELU:
            total = relu(total)
        if SCORE:
            end = tl.load(score_weight_ptr + outs, mask=outs < S, other=0.0).to(tl.float32)
            score += tl.sum(total * end[None, :], 1)
        else:
            to = y_ptr + y_row[:, None] * S + outs
            tl.store(to, total.to(y_ptr.dtype.element_ty), mask=real[:, None] & (outs < S))
    if SCORE:
        score += tl.load(score_bias_ptr).to(tl.float32)
        if not LOGIT:
            score = tl.sigmoid(score)
        tl.store(y_ptr + y_row, score.to(y_ptr.dtype.element_ty), mask=real)


class Rows(NamedTuple):
    """Where rows of S values, or single values, lie: row r of image i is row `(first + i) * rows + r - origin`."""

    data: Tensor
    first: int
    rows: int
    origin: int


class End(NamedTuple):
    """The last layer, from z to a number: w_e [S], b_e [1], and whether the result is the sum, not its sigmoid."""

    weight: Tensor
    bias: Tensor
    logit: bool


class Folded(NamedTuple):
    """Weights of K steps: M^T, u, Wr, br. Matrices [K, S, S] in the nodes' dtype, vectors [K, S] in float32."""

    ask: Tensor
    shift: Tensor
    value: Tensor
    bias: Tensor


def fold(query_weight, query_bias, key_weight, value_weight, value_bias) -> Folded:
    """Fold query and key weights into M and u, (3)."""
    ask, shift = folded_exactly(query_weight, query_bias, key_weight)
    return Folded(ask, shift, _launch.aligned(value_weight), _launch.aligned(value_bias.float()))


class Block(NamedTuple):
    """A number of images, and the window of captions of `plan` that they are computed with."""

    images: int
    window: Window
    plan: NodePlan

    @property
    def captions(self) -> int:
        return self.window.captions.stop - self.window.captions.start

    @property
    def nodes(self) -> int:
        return self.window.rows.stop - self.window.rows.start

    def scratch(self, data: Tensor) -> Rows:
        """`data` [images, nodes, S] as rows."""
        return Rows(data, 0, self.nodes, self.window.rows.start)


def blocks(
    images: int, cu_seqlens: Tensor, rows: int, op: str, sizes: tuple[int, ...], node_bytes: int, each: int = 0
) -> Iterator[tuple[int, Block]]:
    """Cut images x captions into blocks that fit the scratch memory, at `node_bytes` a node and `each` an image.

    Yields the number of the block's first image, and the block.
    """
    fits = max(1, (scratch_bytes(cu_seqlens.device) - each) // node_bytes)
    window = min(WINDOW, 1 << (fits.bit_length() - 1))
    plan = node_plan(cu_seqlens, rows, op, sizes, window)
    for part in plan.windows:
        size = max(1, scratch_bytes(cu_seqlens.device) // (each + node_bytes * (part.rows.stop - part.rows.start)))
        for images_ in spans(images, size):
            yield images_.start, Block(images_.stop - images_.start, part, plan)


def sizes(weights: Folded, backward: bool = False) -> tuple[int, ...]:
    """Tile sizes of `_step`; none if there is only the last step, which uses no tiles."""
    M = weights.ask
    return _tiles.node_tiles(M.dtype, _launch.arch(M.device), M.shape[2], backward) if len(M) > 1 else ()


def step(k: int, weights: Folded, x: Rows, y: Rows, block: Block) -> None:
    """Compute step k at all nodes, from x into y, whose image 0 is the block's first."""
    S, dtype, plan = weights.ask.shape[2], x.data.dtype, block.plan
    padded, precision = _launch.power_of_two(S), _tiles.products(dtype)
    for tiles in block.window.tiles:
        tile = _tiles.graph_step(dtype, _launch.arch(x.data.device), precision, tiles.size, S)
        parts = tile["BLOCK_N"] // tile["BLOCK_Q"]
        _step[(block.images * tiles.number * parts,)](
            x.data, weights.ask[k], weights.shift[k], weights.value[k], weights.bias[k], y.data, plan.row, plan.owner,
            tiles.number, tiles.first, x.first, x.rows, x.origin, y.rows, y.origin,
            S=S, PADDED=padded, PRECISION=precision, **within(tile, padded),
        )  # fmt: skip


def ask(weights: Folded, x: Rows, block: Block) -> Tensor:
    """Y = x M + u at the global nodes, for the last step: [images, captions, S] float32."""
    y = torch.empty(block.images, block.captions, weights.ask.shape[2], dtype=torch.float32, device=x.data.device)
    to = Rows(y, 0, block.captions, block.window.captions.start)
    dense(x, weights.ask[-1], weights.shift[-1], to, block, FIRST_NODES=True)
    return y


def read(asked: Tensor, x: Rows, block: Block) -> Tensor:
    """E X at the global nodes, for the last step: [images, captions, S] in the nodes' dtype."""
    S, captions = asked.shape[2], block.window.captions
    tile = _tiles.graph_read(x.data.dtype, _launch.arch(x.data.device))
    z = torch.empty(asked.shape, dtype=x.data.dtype, device=asked.device)
    groups = _launch.blocks(block.captions, tile["CAPTIONS"])
    _read[(block.images * groups,)](
        x.data, asked, block.plan.start, z, groups, captions.start, captions.stop, x.first, x.rows, x.origin,
        S=S, PADDED=_launch.power_of_two(S), **tile,
    )  # fmt: skip
    return z


def answer(weights: Folded, z: Tensor, to: Rows, block: Block, end: End | None = None) -> None:
    """Write relu(z Wr^T + br) of the last step into rows of S or, given `end`, its results into single values."""
    x = Rows(z, 0, block.captions, block.window.captions.start)
    dense(x, weights.value[-1], weights.bias[-1], to, block, end, RELU=True)


def dense(
    x: Rows, weight: Tensor, bias: Tensor, to: Rows, block: Block, end: End | None = None,
    *, FIRST_NODES: bool = False, RELU: bool = False,
) -> None:  # fmt: skip
    """Launch `_dense` for all pairs of a block."""
    S, dtype, captions = len(weight), x.data.dtype, block.window.captions
    padded, pairs = _launch.power_of_two(S), block.images * block.captions
    tile = within(_tiles.graph_dense(dtype, _launch.arch(x.data.device)), padded)
    _dense[(_launch.blocks(pairs, tile["BLOCK_P"]),)](
        x.data, block.plan.start, weight, bias, to.data, *(end[:2] if end else (bias, bias)),
        pairs, block.captions, captions.start, x.first, x.rows, x.origin, to.first, to.rows, to.origin,
        S=S, PADDED=padded, FIRST_NODES=FIRST_NODES, RELU=RELU, SCORE=end is not None,
        LOGIT=end is not None and end.logit, PRECISION=_tiles.products(dtype), **tile,
    )  # fmt: skip


def within(tile: _tiles.Tile, padded: int) -> _tiles.Tile:
    """The tile with its blocks along S no longer than S, padded to a power of two."""
    along = "BLOCK_C", "BLOCK_K", "BLOCK_O", "BLOCK_Y"
    return tile | {name: min(tile[name], padded) for name in along if name in tile}


def reason(weights: Folded, x: Rows, to: Rows, block: Block, end: End | None = None) -> None:
    """All steps: write the global nodes' result, or the results of `end` if given, into `to`. x is not overwritten."""
    K, S = len(weights.ask), weights.ask.shape[2]
    shape, room = (block.images, block.nodes, S), []
    for k in range(K - 1):
        if k < 2:
            room.append(torch.empty(shape, dtype=x.data.dtype, device=x.data.device))
        y = block.scratch(room[k % 2])
        step(k, weights, x, y, block)
        x = y
    answer(weights, read(ask(weights, x, block), x, block), to, block, end)


def node_bytes(S: int, dtype: torch.dtype, buffers: int) -> int:
    """Scratch bytes per node: `buffers` rows of S, and (at most) its caption's E X and, in float32, Y."""
    return S * ((buffers + 1) * dtype.itemsize + 4)


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for dtype, t in _tiles.NAMES.items():
        shape = dict(S=256, PADDED=256)
        for precision in _tiles.precisions(dtype):
            types = f"*{t} *{t} *fp32 *{t} *fp32 *{t} *i32 *i32 i32 i32 i32 i32 i32 i32 i32"
            for size, width in [(64, 256), (128, 256), *[(128, 512)] * (dtype == torch.float16)]:
                tile = within(_tiles.graph_step(dtype, arch, precision, size, width), width)
                constants = dict(S=width, PADDED=width, PRECISION=precision)
                yield _tiles.Compilation(_step, types, constants, tile, products=tile["BLOCK_Q"] >= 64)
            tile, rest = within(_tiles.graph_dense(dtype, arch), 256), "i32 i32 i32 i32 i32 i32 i32 i32 i32"
            ways = [("fp32", True, False, False, False), (t, False, True, False, False)]
            ways += [(t, False, True, True, logit) for logit in (False, True)]
            for y, first, rectified, score, logit in ways:
                end = f"*{t} *{t}" if score else "*fp32 *fp32"
                yield _tiles.Compilation(
                    _dense,
                    f"*{t} *i32 *{t} *fp32 *{y} {end} {rest}",
                    shape
                    | dict(FIRST_NODES=first, RELU=rectified, SCORE=score, LOGIT=logit, PRECISION=precision),
                    tile,
                    products=True,
                )
        types = f"*{t} *fp32 *i32 *{t} i32 i32 i32 i32 i32 i32"
        yield _tiles.Compilation(_read, types, shape, _tiles.graph_read(dtype, arch))
