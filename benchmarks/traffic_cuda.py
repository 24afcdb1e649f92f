"""What the CUDA C++ kernels move and compute, from the sizes of their tiles; no launch is recorded.

Sizes come from the modules that plan the launches (itm_fast/ops/_cuda); `BAND`, `BLOCK` and `SHORT` repeat
constants of csrc/cuda. Products and copies to shared memory are those that the emulated kernels count
(tests/test_traffic_cuda.py).

Masked rows are not loaded. The memory that a kernel reads follows from the order of its blocks: `scan_t2i` walks along
all captions with some groups of images, so the captions' rows are read once for each walk; the launches of the pair
scorers read the rows of their window of captions once. What `weights` and `global_nodes` write for a launch is small
enough to be in L2 when the head's kernel reads it. Torch prepares rows, lengths and factors, once for each image or
caption: that is counted as if each were one pass, and for a `workspace` that holds all of it; with less, blocks of
images and captions are prepared and scored one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks import traffic_shared
from benchmarks.cards import Card
from benchmarks.traffic_counts import Count, blocks
from benchmarks.traffic_shared import WARPS, NodeTile, Sees
from itm_fast import _cuda
from itm_fast.ops import _attention
from itm_fast.ops._cuda import _pairs, _tiles, cross_attention_score, similarity_score
from itm_fast.packing import NodePlan, node_bounds, node_plan

BAND = 16  # groups of images of a walk (affinity.h)
BLOCK = 16  # rows of a tile of nodes that hold nodes of one caption
SHORT = 24  # words of a caption that a thread keeps in registers (scan.cu)
KINDS = {"bfloat16": "bfloat16", "tf32": "float16", "float32": "float16x3"}  # by precision: kind of products
FORMS = {
    "bfloat16": _pairs.Kind("BF16", False, 1), "tf32": _pairs.Kind("F16", True, 1),
    "float32": _pairs.Kind("F16X3", True, 2),
}  # fmt: skip
HEADS = {
    "similarity_graph_score": similarity_score.graph_kernel,
    "similarity_filter_score": similarity_score.filter_kernel,
}


@dataclass
class Problem:
    """Sizes of a call with captions' bounds `edge` [T + 1], the card, and the features' precision."""

    op: str
    I: int
    R: int
    D: int
    S: int
    K: int
    edge: torch.Tensor
    card: Card
    precision: str
    direction: str = "t2i"  # SCAN's

    @property
    def T(self) -> int:
        return len(self.edge) - 1

    @property
    def N(self) -> int:
        return int(self.edge[-1])

    @property
    def kind(self) -> str:
        return KINDS[self.precision]

    @property
    def size(self) -> int:
        """Bytes of a feature as products read it: two float16 numbers for float32."""
        return 4 if self.precision == "float32" else 2

    @property
    def halves(self) -> int:
        """16-bit numbers that stand for one as products read it."""
        return self.size // 2

    @property
    def given(self) -> int:
        """Bytes of a feature, or of a score, as the caller has it."""
        return 4 if self.precision in ("tf32", "float32") else 2

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.card.arch or 75, 10)

    @property
    def pitch(self) -> int:
        return _pairs.pitch_of(_tiles.tile_of(self.R, self.capability))

    @cached_property
    def kernels(self) -> _pairs.Kernels | None:
        """The pair scorers' kernels, None if they do not fit the card."""
        variant = _cuda.CLUSTERS if self.capability == _cuda.SPECIFIC else _cuda.GENERAL
        return _pairs.kernels(HEADS[self.op], FORMS[self.precision], self.R, self.S, self.capability, variant)

    @property
    def groups(self) -> bool:
        """Whether groups of warps make most products of the head's kernel."""
        assert self.kernels is not None
        return self.kernels.head.specific

    def readers(self, blocks_: int) -> int:
        """How often blocks of the head's kernel read the matrices of weights, once for a cluster."""
        assert self.kernels is not None
        return blocks_ // self.kernels.head.cluster

    @cached_property
    def nodes(self) -> NodePlan:
        assert self.kernels is not None
        slots = [self.kernels.head_slots]
        return node_plan(node_bounds(self.edge), self.N + self.T, self.op, slots, _pairs.WINDOW)

    @cached_property
    def launches(self) -> int:
        """Windows of captions, each with some images at a time."""
        images = 0
        for window in self.nodes.windows:
            captions = window.captions.stop - window.captions.start
            words = window.rows.stop - window.rows.start - captions
            each = words * (self.pitch * self.size + 4) + captions * self.S * self.size
            images += blocks(self.I, max(1, _pairs.LAUNCH_BYTES // each))
        return images


def counts(p: Problem) -> Iterator[tuple[str, Count]] | str:
    """The launches of an op's kernels together: each one's name and count; or why there is none."""
    if p.card.rate(p.kind) is None:
        return f"the {p.card.name} has no {p.kind} products"
    if p.op not in HEADS:
        found = _scan(p)
    elif p.kernels and int(p.edge.diff().max()) <= p.kernels.words:
        found = _scores(p, p.kernels)
    else:
        return f"the {p.card.name} has too little shared memory for the longest captions"
    return ((name, replace(count, by_mma=True)) for name, count in found)


def _prepared(p: Problem) -> Iterator[tuple[str, Count]]:
    """What depends on one image or one caption alone."""
    if p.given == 4:
        for name, rows in (("words", p.N), ("image", p.I * p.R)):
            split = Count(blocks(rows, 8))
            split.reads(name, rows * p.D * 4, rows * p.D * 4)
            split.writes(f"{name} split", rows * p.D * p.size)
            split.vector = rows * p.D * 6
            yield "split_rows", split
    kind = "float64" if p.card.rate("float64") else "vector"
    factor = Count(p.I if p.direction == "t2i" else p.T)
    name, rows = ("image", p.I * p.R) if p.direction == "t2i" else ("words", p.N)
    factor.reads(name, rows * p.D * p.given, rows * p.D * p.given)
    factor.writes("factor", _factor_bytes(p))
    if p.direction == "t2i":
        factor.dots(p.I, p.R, p.R, p.D, kind)
    else:
        factor.dots(1, int((p.edge.diff().long() ** 2).sum()), 1, p.D, kind)
    yield "factors", factor


def _factor_bytes(p: Problem) -> int:
    """Of the factors of all images' Gram matrices, or of all captions'."""
    length = p.edge.diff().long()
    return p.I * p.pitch**2 * 4 if p.direction == "t2i" else int((blocks(length, 4) * length).sum()) * 16


def _affinities(p: Problem, tiles: int, tile: _tiles.Tile, walks: int, again: int = 0) -> Count:
    """What `scan_t2i`, `scan_i2t` and `weights` begin with: the affinities of all words and regions.

    Args:
        p: the problem.
        tiles: of words.
        tile: the sizes of one.
        walks: how often all words are read from memory.
        again: words of the last tile, if a block of a cluster without a tile of its own reads them too.
    """
    groups, words, image = blocks(p.I, tile.images), p.N * p.D * p.size, p.I * p.R * p.D * p.size
    done = Count(tiles * groups)
    done.reads("words", words * walks, (words + again * p.D * p.size) * groups)
    if tile.clusters:  # two blocks read the regions once; stages of 128 bytes of a row have zeros where there are none
        tiles, staged = _pairs.rounded_up(tiles, 2), _staged(p, tile)
        done = replace(done, programs=tiles * groups)
        done.reads("stages", staged, staged * tiles // 2)
    else:
        done.reads("image", image, image * tiles)
    depth = _pairs.rounded_up(p.D, 128 // p.size)
    done.dots(tiles * groups, tile.slots, tile.images * tile.columns, depth, p.kind, tile.clusters)
    traffic_shared.affinities(done, tile, p.D * p.size, p.halves)
    return done


def _staged(p: Problem, tile: _tiles.Tile) -> int:
    """Bytes of all images' regions in stages."""
    return blocks(p.I, tile.images) * tile.images * tile.columns * _pairs.rounded_up(p.D, 128 // p.size) * p.size


def _attended(p: Problem, done: Count, tiles: int, tile: _tiles.Tile) -> None:
    """Add the words' softmax over regions and the lengths of attended vectors."""
    groups = blocks(p.I, tile.images)
    done.reads("factor", _factor_bytes(p), _factor_bytes(p) * tiles)
    # The upper triangle of a factor, in blocks of 8 x 8; both it and the weights are sums of two float16 numbers.
    triangle = p.pitch // 8 * (p.pitch // 8 + 1) // 2
    done.dots(done.programs * tile.images * triangle, tile.slots, 8, 8, "float16x3")
    columns = groups * tile.images * tile.columns
    done.vector = done.programs // groups * columns * tile.slots * 14
    # Affinities are read to be normalised, over columns without regions too; then the numbers for that by each slot.
    done.plain += ((p.N + p.T) * columns + done.programs // groups * tile.slots * p.I * p.R) * 4


def _triangle(length: torch.Tensor) -> int:
    """Words that are read of captions' factors, four rows at a time, from the first row's diagonal on."""
    return sum(int((length - y).clamp(min=0).sum()) for y in range(0, max(length.tolist(), default=0), 4))


def _attended_words(p: Problem, done: Count, groups: int) -> None:
    """Add the regions' softmax over words and the lengths of attended vectors; a thread has a caption and a region."""
    done.reads("factor", _factor_bytes(p), _factor_bytes(p) * groups)
    length = p.edge.diff().long()
    done.vector = p.I * p.R * (p.N * 20 + _triangle(length) * 5)
    # A thread reads a short caption's affinities once, with the numbers that normalise them. Of a long one it does so
    # twice, reads the affinity once more, and writes v, which it reads for each four rows of the factor. At the end it
    # writes a cosine, which is pooled in two passes.
    long = length[length > SHORT]
    done.plain += p.I * p.R * (2 * p.N + 4 * int(long.sum()) + _triangle(long) + 3 * p.T) * 4


def _scan(p: Problem) -> Iterator[tuple[str, Count]]:
    yield from _prepared(p)
    name, rows = ("words", p.N) if p.direction == "t2i" else ("image", p.I * p.R)
    lengths = Count(blocks(rows, 8))
    lengths.reads(name, rows * p.D * p.given, rows * p.D * p.given)
    lengths.writes("length", rows * 4)
    lengths.vector = rows * p.D * 3
    yield "lengths", lengths
    tile = cross_attention_score.tile_of(p.R, p.capability)
    if cross_attention_score.clustered(tile, p.capability):
        tile, staged = cross_attention_score.CLUSTERED, Count(1)
        staged.reads("image", p.I * p.R * p.D * p.size, p.I * p.R * p.D * p.size)
        staged.writes("stages", _staged(p, tile))
        yield "stages", staged
    plan = _tiles.plan_tiles(p.edge, p.N, p.op, tile.slots)
    groups = blocks(p.I, tile.images)
    again = int((plan.row[-tile.slots :] >= 0).sum()) if tile.clusters and plan.tiles % 2 else 0
    scan = _affinities(p, plan.tiles, tile, blocks(groups, BAND), again)
    if p.direction == "t2i":
        _attended(p, scan, plan.tiles, tile)  # and cosines, which are pooled in two passes
        scan.plain += ((p.N + again) * groups * tile.images + 2 * p.N * p.I) * 4
    else:
        _attended_words(p, scan, groups)
        scan.plain += scan.programs * tile.slots * tile.images * 4  # numbers that normalise affinities
    scan.writes("score", p.I * p.T * p.given)
    if p.precision == "float32" and p.capability >= _attention.TENSOR_FLOAT32:
        scan.launches = 2  # the other one computes pairs of wide rows
    yield f"scan_{p.direction}", scan


def _scores(p: Problem, fit: _pairs.Kernels) -> Iterator[tuple[str, Count]]:
    yield from _prepared(p)
    windows, walks = p.nodes.windows, blocks(p.launches, len(p.nodes.windows))
    plans = _pairs.weight_plans(p.edge, p.edge.tolist(), [w.captions for w in windows], fit.tile.slots)
    tiles = sum(plan.tiles for plan in plans)
    weights = _affinities(p, tiles, fit.tile, walks)
    _attended(p, weights, tiles, fit.tile)
    slots = fit.overall_slots
    weights.launches = p.launches
    written = p.N * p.I * (p.pitch * p.size + 4)
    weights.writes("weights", written)
    yield "weights", weights
    overall = Count(sum(blocks(w.captions.stop - w.captions.start, slots) for w in windows) * p.I, p.launches)
    overall.reads("globals", (p.I + p.T * walks) * p.D * p.size, (p.T * p.I + overall.programs) * p.D * p.size)
    overall.reads("global weight", p.S * p.D * p.size, overall.programs * p.S * p.D * p.size)
    overall.writes("global nodes", p.I * p.T * p.S * p.size)
    tile = NodeTile.of(fit.overall, p.halves)
    overall.dots(overall.programs, slots, p.S, tile.stages(p.D) * tile.depth, p.kind)
    overall.shared, overall.plain = (overall.programs * n for n in tile.overall(p.D))
    overall.plain += p.T * p.I * p.S * p.size  # nodes are read again, to be written to memory
    overall.vector = overall.programs * slots * (p.D * (6 if p.size == 4 else 3) + p.S * 5)
    yield "global_nodes", overall
    tile = NodeTile.of(fit.head, p.halves)
    done, shapes = _nodes(p, tile, walks, written)
    if p.op == "similarity_graph_score":
        _steps(p, tile, done, shapes)
        yield "graph_scores", done
    else:
        done.vector += sum(rows * n * p.S * 5 for rows, n in shapes)
        held = p.I * int(blocks(p.edge.diff() + 1, BLOCK).sum())
        done.plain += done.programs * tile.filtered(p.I * (p.N + p.T) / done.programs) + held * p.S * 4
        done.plain += p.I * p.T * tile.by_caption(5)
        yield "filter_scores", done


def _nodes(p: Problem, tile: NodeTile, walks: int, weights: int) -> tuple[Count, list[tuple[int, int]]]:
    """What a head's kernel does to make nodes in shared memory; and (rows of a tile, such tiles of all images)."""
    shapes = [(t.size, t.number * p.I) for window in p.nodes.windows for t in window.tiles]
    number = sum(n for _, n in shapes)
    done, words = Count(number, p.launches), p.N * p.D * p.size
    done.reads("words", words * walks, words * p.I)
    done.reads("image", p.I * p.R * p.D * p.size, number * p.R * p.D * p.size)
    staged = tile.stages(p.D) * tile.depth  # numbers of a row in stages, with zeros behind them
    held_weight = p.S * (staged if p.kernels and p.kernels.head.cluster > 1 else p.D) * p.size
    done.reads("local weight", held_weight, p.readers(number) * held_weight)
    held = 0 if p.card.cache > _pairs.LAUNCH_BYTES else 1  # in L2 since they were written
    overall = p.I * p.T * p.S * p.size
    done.reads("weights", held * weights, weights)
    done.reads("global nodes", held * overall, overall)
    done.writes("score", p.I * p.T * p.given)
    for rows, n in shapes:
        if p.groups and p.precision == "float32":  # four products of halves, each of two numbers' worth
            done.dots(n, rows, 2 * staged, 2 * tile.regions, "float16", p.groups)
        else:
            done.dots(n, rows, staged, tile.regions, p.kind, p.groups)
        done.dots(n, rows, p.S, staged, p.kind, p.groups)
        done.vector += n * rows * (p.D * (8 if p.size == 4 else 5) + p.S * 5)
    done.shared, done.plain = (number * n for n in tile.made(p.D))
    # Of a row that holds no word, threads read whose it is.
    done.plain += (sum(rows * n for rows, n in shapes) - p.I * p.N) * 16 * tile.side
    return done, shapes


def _steps(p: Problem, tile: NodeTile, done: Count, shapes: list[tuple[int, int]]) -> None:
    """Add the steps of reasoning, the last one at the first nodes only."""
    for name in ("ask", "value"):
        done.reads(name, p.K * p.S**2 * p.size, p.readers(done.programs) * p.K * p.S**2 * p.size)
    # Pairs of blocks of an image's nodes with a weight: all of one caption; an empty block has itself.
    held = blocks(p.edge.diff() + 1, BLOCK)
    seen = p.I * int((held**2 - held).sum()) + sum(rows * n for rows, n in shapes) // BLOCK
    done.dots(2 * (p.K - 1) * seen, BLOCK, BLOCK, p.S, p.kind)
    done.vector += (p.K - 1) * seen * BLOCK**2 * 8
    sees = None
    if not p.groups:
        size = tile.slots // BLOCK
        sees = Sees.of(p.nodes.owner[::BLOCK].view(-1, size), size * tile.side // WARPS)
    moved = tile.steps(p.K, seen / done.programs, p.I * int(held.sum()) / done.programs, sees)
    done.plain += p.I * p.T * tile.by_caption(10)
    done.shared, done.plain = done.shared + done.programs * moved[0], done.plain + done.programs * moved[1]
    repeated = max(p.S, WARPS * BLOCK)  # columns of a small S are computed by several warps
    for rows, n in shapes:
        done.dots(2 * n * (p.K - 1), rows, p.S, p.S, p.kind, p.groups)
        done.dots(2 * n, traffic_shared.FIRSTS, repeated, p.S, p.kind)
        done.vector += n * ((p.K - 1) * rows + traffic_shared.FIRSTS) * p.S * 8
        done.vector += n * rows * p.S * (6 if p.size == 4 else 4)  # edges of first nodes, and sums along them
