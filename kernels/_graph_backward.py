"""Backward of one step of graph reasoning: (5) and (6) of `ops/similarity_graph.py`.

From a step's nodes X, their Y = X M + u and dZ, all [BLOCK_N, S] in a tile of whole captions, E is computed again and

    Z = E X,   dL = E (dZ X^T - sum over columns of E dZ X^T),   dY = dL X                      `_step_back_queries`
    dX = E^T dZ + dL^T Y, from the statistics of each row that the kernel above stores          `_step_back_keys`
    the same for the last step, where only the global node has a Y                              `_read_back`

Two kernels compute the small products with E twice, but each holds only [BLOCK_M, BLOCK_N] of E at once: a whole E of
128 rows in float32 does not fit the registers. The products with the weights, (4) and (6), are torch's (`Walk`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _tiles
from ._graph import Block, Folded, Rows, answer, ask, read, step, within
from ._tl import NEVER


@triton.jit
def _places(row_ptr, owner_ptr, tiles, slot, image_rows, origin, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, whether it is a node, caption), first for the program's BLOCK_M slots of a tile, then for all BLOCK_N."""
    program, parts = tl.program_id(0).to(tl.int64), BLOCK_N // BLOCK_M
    image, tile, part = program // parts // tiles, program // parts % tiles, program % parts
    others = slot + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = slot + tile * BLOCK_N + part * BLOCK_M + tl.arange(0, BLOCK_M)
    m, n = tl.load(row_ptr + mine).to(tl.int64), tl.load(row_ptr + others).to(tl.int64)
    base = image * image_rows - origin
    return base + m, m >= 0, tl.load(owner_ptr + mine), base + n, n >= 0, tl.load(owner_ptr + others)


@triton.jit(do_not_specialize=["tiles", "slot", "image_rows", "origin"])
def _step_back_queries(
    x_ptr, y_ptr, dz_ptr, z_ptr, dy_ptr, top_ptr, total_ptr, mean_ptr, row_ptr, owner_ptr,
    tiles, slot, image_rows, origin,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Z, dY, and per row the largest logit, the softmax's sum, and sum E dE. All rows: [images * image_rows, S].

    `row_ptr`, `owner_ptr`: slots of `NodePlan` from `slot` on; packed node `origin` is row 0 of an image.
    One program: BLOCK_M rows (queries) of a tile of an image. Grid: images x tiles x parts.
    """
    query, query_real, asking, key, key_real, asked = _places(
        row_ptr, owner_ptr, tiles, slot, image_rows, origin, BLOCK_M, BLOCK_N
    )
    queries, keys = query[:, None] * S, key[:, None] * S
    dtype = x_ptr.dtype.element_ty
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    d_edges = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(0, PADDED, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        x = tl.trans(tl.load(x_ptr + keys + cols, mask=key_real[:, None] & (cols < S), other=0.0))
        mask = query_real[:, None] & (cols < S)
        logits = tl.dot(tl.load(y_ptr + queries + cols, mask=mask, other=0.0), x, logits, input_precision=PRECISION)
        d_edges = tl.dot(tl.load(dz_ptr + queries + cols, mask=mask, other=0.0), x, d_edges, input_precision=PRECISION)
    # Empty slots form a caption of zeros, so every row has a key.
    logits = tl.where(asking[:, None] == asked[None, :], logits, NEVER)
    top = tl.max(logits, 1)
    weights = tl.exp(logits - top[:, None])
    total = tl.sum(weights, 1)
    weights = weights / total[:, None]
    mean = tl.sum(weights * d_edges, 1)
    tl.store(top_ptr + query, top, mask=query_real)
    tl.store(total_ptr + query, total, mask=query_real)
    tl.store(mean_ptr + query, mean, mask=query_real)
    d_logits = (weights * (d_edges - mean[:, None])).to(dtype)
    edges = weights.to(dtype)
    for c in range(0, PADDED, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + keys + cols, mask=key_real[:, None] & (cols < S), other=0.0)
        mask = query_real[:, None] & (cols < S)
        tl.store(z_ptr + queries + cols, tl.dot(edges, x, input_precision=PRECISION).to(dtype), mask=mask)
        tl.store(dy_ptr + queries + cols, tl.dot(d_logits, x, input_precision=PRECISION).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["tiles", "slot", "image_rows", "origin"])
def _step_back_keys(
    x_ptr, y_ptr, dz_ptr, dx_ptr, top_ptr, total_ptr, mean_ptr, row_ptr, owner_ptr, tiles, slot, image_rows, origin,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dX without dY M^T, from the row statistics of `_step_back_queries`. Arguments and grid as there.

    One program: BLOCK_M columns (keys) of a tile of an image.
    """
    key, key_real, asked, query, query_real, asking = _places(
        row_ptr, owner_ptr, tiles, slot, image_rows, origin, BLOCK_M, BLOCK_N
    )
    keys, queries = key[:, None] * S, query[:, None] * S
    dtype = x_ptr.dtype.element_ty
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    d_edges = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c in range(0, PADDED, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + keys + cols, mask=key_real[:, None] & (cols < S), other=0.0)
        mask = query_real[:, None] & (cols < S)
        y = tl.load(y_ptr + queries + cols, mask=mask, other=0.0)
        dz = tl.load(dz_ptr + queries + cols, mask=mask, other=0.0)
        logits = tl.dot(x, tl.trans(y), logits, input_precision=PRECISION)
        d_edges = tl.dot(x, tl.trans(dz), d_edges, input_precision=PRECISION)
    top = tl.load(top_ptr + query, mask=query_real, other=0.0)
    total = tl.load(total_ptr + query, mask=query_real, other=1.0)
    mean = tl.load(mean_ptr + query, mask=query_real, other=0.0)
    logits = tl.where(asked[:, None] == asking[None, :], logits, NEVER)
    weights = tl.exp(logits - top[None, :]) / total[None, :]
    d_logits = (weights * (d_edges - mean[None, :])).to(dtype)
    edges = weights.to(dtype)
    for c in range(0, PADDED, BLOCK_C):
        cols = c + tl.arange(0, BLOCK_C)
        mask = query_real[:, None] & (cols < S)
        y = tl.load(y_ptr + queries + cols, mask=mask, other=0.0)
        dz = tl.load(dz_ptr + queries + cols, mask=mask, other=0.0)
        dx = tl.dot(edges, dz, input_precision=PRECISION)
        dx = tl.dot(d_logits, y, dx, input_precision=PRECISION)
        tl.store(dx_ptr + keys + cols, dx.to(dtype), mask=key_real[:, None] & (cols < S))


@triton.jit(do_not_specialize=["groups", "first", "last", "image_rows", "origin"])
def _read_back(
    x_ptr, asked_ptr, dz_ptr, start_ptr, d_asked_ptr, dx_ptr, groups, first, last, image_rows, origin,
    S: tl.constexpr, CAPTIONS: tl.constexpr, BLOCK_R: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Last step: dX [images, image_rows, S] without dY M^T, and dY (`d_asked_ptr`), from Y (`asked_ptr`) and dZ.

    Y, dY, dZ: [images, captions, S]. Captions of any length. One program: an image with CAPTIONS captions. Grid:
    images x groups.
    """
    program = tl.program_id(0).to(tl.int64)
    image, group = program // groups, program % groups
    s = tl.arange(0, PADDED)
    x_ptr += image * image_rows * S
    dx_ptr += image * image_rows * S
    begin = first + group * CAPTIONS
    for t in range(begin, tl.minimum(begin + CAPTIONS, last)):
        at = (image * (last - first) + t - first) * S + s
        asked = tl.load(asked_ptr + at, mask=s < S, other=0.0)  # [PADDED]
        dz = tl.load(dz_ptr + at, mask=s < S, other=0.0).to(tl.float32)
        start, stop = tl.load(start_ptr + t), tl.load(start_ptr + t + 1)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        mean = tl.zeros([], tl.float32)  # sum over the nodes of E dE
        for chunk in range(start, stop, BLOCK_R):
            row = chunk + tl.arange(0, BLOCK_R)
            offset = (row - origin).to(tl.int64)[:, None] * S + s
            x = tl.load(x_ptr + offset, mask=(row < stop)[:, None] & (s < S), other=0.0).to(tl.float32)
            logit = tl.where(row < stop, tl.sum(x * asked[None, :], 1), float("-inf"))
            higher = tl.maximum(top, tl.max(logit, 0))
            shrunk = tl.exp(top - higher)
            weight = tl.exp(logit - higher)
            total = total * shrunk + tl.sum(weight, 0)
            mean = mean * shrunk + tl.sum(weight * tl.sum(x * dz[None, :], 1), 0)
            top = higher
        mean /= total
        d_asked = tl.zeros([PADDED], tl.float32)
        for chunk in range(start, stop, BLOCK_R):
            row = chunk + tl.arange(0, BLOCK_R)
            offset = (row - origin).to(tl.int64)[:, None] * S + s
            mask = (row < stop)[:, None] & (s < S)
            x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            logit = tl.where(row < stop, tl.sum(x * asked[None, :], 1), float("-inf"))
            weight = tl.exp(logit - top) / total
            d_logit = weight * (tl.sum(x * dz[None, :], 1) - mean)
            d_asked += tl.sum(x * d_logit[:, None], 0)
            dx = weight[:, None] * dz[None, :] + d_logit[:, None] * asked[None, :]
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(d_asked_ptr + at, d_asked.to(d_asked_ptr.dtype.element_ty), mask=s < S)


def _precision(precision: str, nodes: int) -> str:
    """"ieee" in place of "tf32x3" for tiles of 128 nodes, where tf32x3 spills registers; such captions are rare."""
    return "ieee" if precision == "tf32x3" and nodes > 64 else precision


class Walk:
    """Backward of blocks, one after the other; sums the folded weights' gradients over them when `sums`."""

    def __init__(self, weights: Folded, sums: bool) -> None:
        self.weights = weights
        self.found = Folded(*(torch.zeros_like(w, dtype=torch.float32) for w in weights)) if sums else None

    def __call__(self, nodes: Tensor, grad: Tensor, block: Block) -> Tensor:
        """d_nodes [images, nodes, S] of a block, from its nodes and its result's gradient [images, captions, S]."""
        weights, K = self.weights, len(self.weights.ask)
        x = [_launch.aligned(nodes)]
        for k in range(K - 1):
            x.append(torch.empty_like(x[0]))
            step(k, weights, block.scratch(x[k]), block.scratch(x[k + 1]), block)
        dx = self._read_out(x[-1], grad, block)
        for k in reversed(range(K - 1)):
            dx = self._step(k, x[k], dx.where(x.pop() > 0, 0), block)
        return dx

    def _read_out(self, x: Tensor, grad: Tensor, block: Block) -> Tensor:
        weights, plan, captions, S = self.weights, block.plan, block.window.captions, x.shape[2]
        nodes = block.scratch(x)
        asked = ask(weights, nodes, block)
        z = read(asked, nodes, block)
        result = torch.empty_like(z)
        answer(weights, z, Rows(result, 0, block.captions, captions.start), block)
        dh = grad.where(result > 0, 0)
        dz, d_asked, dx = dh @ weights.value[-1], torch.empty_like(z), torch.empty_like(x)
        tile = _tiles.graph_read(x.dtype, _launch.arch(x.device))
        groups = _launch.blocks(block.captions, tile["CAPTIONS"])
        _read_back[(block.images * groups,)](
            x, asked, dz, plan.start, d_asked, dx, groups, captions.start, captions.stop, block.nodes, nodes.origin,
            S=S, PADDED=_launch.power_of_two(S), **tile,
        )  # fmt: skip
        first = plan.start[captions].long() - nodes.origin
        self._add(-1, x[:, first], d_asked, dh, z)
        dx[:, first] += d_asked @ weights.ask[-1]
        return dx

    def _step(self, k: int, x: Tensor, dh: Tensor, block: Block) -> Tensor:
        weights, plan, S = self.weights, block.plan, x.shape[2]
        rows, padded, arch = x.view(-1, S), _launch.power_of_two(S), _launch.arch(x.device)
        y = torch.addmm(weights.shift[k].to(x.dtype), rows, weights.ask[k].t())
        dz = dh.view(-1, S) @ weights.value[k]
        z, dy, dx = (torch.empty_like(rows) for _ in range(3))
        statistics = [torch.empty(len(rows), dtype=torch.float32, device=x.device) for _ in range(3)]
        for tiles in block.window.tiles:
            tile = _tiles.graph_step_back(x.dtype, arch, tiles.size)
            grid = (block.images * tiles.number * (tiles.size // tile["BLOCK_M"]),)
            place = plan.row, plan.owner, tiles.number, tiles.first, block.nodes, block.window.rows.start
            precision = _precision(_tiles.products(x.dtype), tiles.size)
            rest = dict(S=S, PADDED=padded, PRECISION=precision, **within(tile, padded))
            _step_back_queries[grid](x, y, dz, z, dy, *statistics, *place, **rest)
            _step_back_keys[grid](x, y, dz, dx, *statistics, *place, **rest)
        self._add(k, rows, dy, dh.view(-1, S), z)
        return dx.addmm_(dy, weights.ask[k]).view(x.shape)

    def _add(self, k: int, x: Tensor, dy: Tensor, dh: Tensor, z: Tensor) -> None:
        """Add a block's part of d Wr, d br, d M and d u: (4) and (6)."""
        if self.found is not None:
            x, dy, dh, z = (a.reshape(-1, a.shape[-1]) for a in (x, dy, dh, z))
            self.found.ask[k] += dy.t() @ x
            self.found.shift[k] += dy.sum(0, dtype=torch.float32)
            self.found.value[k] += dh.t() @ z
            self.found.bias[k] += dh.sum(0, dtype=torch.float32)

    def unfold(self, query_weight: Tensor, query_bias: Tensor, key_weight: Tensor) -> list[Tensor | None]:
        """(7): float32 gradients of the op's six parameters, in its order; Nones when they were not summed."""
        if self.found is None:
            return [None] * 6
        Wq, bq, Wk, ask, shift = (x.double() for x in (query_weight, query_bias, key_weight, *self.found[:2]))
        d_query = Wk @ ask
        d_key = Wq @ ask.transpose(1, 2) + bq[:, :, None] * shift[:, None]
        d_bias = (Wk @ shift[:, :, None]).squeeze(2)
        _, _, d_value, d_value_bias = self.found
        return [d_query.float(), d_bias.float(), d_key.float(), torch.zeros_like(d_value_bias), d_value, d_value_bias]


def compilations(arch: int) -> Iterator[_tiles.Compilation]:
    for dtype, t in _tiles.NAMES.items():
        shape = dict(S=256, PADDED=256)
        for precision in _tiles.precisions(dtype):
            rest = "*fp32 *fp32 *fp32 *i32 *i32 i32 i32 i32 i32"
            for size in _tiles.node_tiles(dtype, arch, 256, backward=True):
                constants = shape | dict(PRECISION=_precision(precision, size))
                tile = within(_tiles.graph_step_back(dtype, arch, size), 256)
                for kernel, tensors in (_step_back_queries, 5), (_step_back_keys, 4):
                    types = " ".join([*[f"*{t}"] * tensors, rest])
                    yield _tiles.Compilation(kernel, types, constants, tile, products=tile["BLOCK_M"] == 64)
        types = f"*{t} *fp32 *{t} *i32 *{t} *{t} i32 i32 i32 i32 i32"
        yield _tiles.Compilation(_read_back, types, shape, _tiles.graph_read(dtype, arch))
