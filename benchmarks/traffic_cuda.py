"""What the planned CUDA C++ kernels would move and compute. They do not exist yet: this is their design, counted.

`TILES` holds every number of the design that the counts follow from. As in `traffic_triton`, masked rows are not
loaded. The memory that a kernel reads follows from the order of its blocks: they walk along all captions with a group
of images that stays in L2, so the captions' rows are read once for each group, and the images once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.cards import Card
from benchmarks.traffic_counts import Count, blocks
from itm_fast.packing import node_bounds, node_plan


@dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks' tiles.

    Attributes:
        words: slots of words of a tile of affinities, which hold whole captions.
        regions: of a tile of affinities: whole images.
        pitch: an image's regions in `weights` and what it writes, a multiple of this.
        fill: share of the slots of words that hold words, packed by best fit.
        images: that walk along the captions together.
        half: rows of nodes among which a caption's edges are computed.
        first: rows of a half that the last step computes: at most so many captions.
        rows: nodes of a tile and larger ones for captions that need them, by (architecture, bytes of a feature).
        rest: `rows` of other architectures.
        captions: of a tile of global nodes, with one image.
    """

    words: int = 128
    regions: int = 144
    pitch: int = 8
    fill: float = 0.96
    images: int = 64
    half: int = 64
    first: int = 16
    rows: tuple[tuple[tuple[int, int], tuple[int, ...]], ...] = (
        ((90, 2), (128,)), ((90, 4), (64, 128)), ((80, 2), (64, 128)),
    )  # fmt: skip
    rest: tuple[int, ...] = (32, 64, 128)
    captions: int = 128

    def nodes(self, arch: int, size: int) -> tuple[int, ...]:
        return dict(self.rows).get((arch, size), self.rest)


TILES = Tiles()
KINDS = {"bfloat16": "bfloat16", "tf32": "float16", "float32": "float16x3"}  # by precision: kind of products


@dataclass
class Problem:
    """Sizes of a call, the card, and the kind and bytes of the features that products read."""

    I: int
    R: int
    D: int
    S: int
    K: int
    edge: torch.Tensor
    card: Card
    precision: str

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
    def given(self) -> int:
        """Bytes of a feature, or of a score, as the caller has it."""
        return 4 if self.precision in ("tf32", "float32") else 2


def planned(op: str, problem: Problem) -> Iterator[tuple[str, Count]] | str:
    """Every launch of an op: the kernel's name and its count; or why there is none."""
    if problem.card.rate(problem.kind) is None:
        return f"the {problem.card.name} has no {problem.kind} products"
    found = {
        "cross_attention_score": _scan, "similarity_graph_score": _graph, "similarity_filter_score": _filter,
    }[op](problem)  # fmt: skip
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
    factor = Count(p.I)
    rows = p.I * p.R * p.D * p.given
    factor.reads("image", rows, rows)
    factor.writes("factor", p.I * p.R**2 * 4)
    factor.dots(p.I, p.R, p.R, p.D, "float64" if p.card.rate("float64") else "vector")
    yield "gram_factor", factor


def _affinities(p: Problem, columns: int) -> Count:
    """The main loop of `scan_t2i` and `weights`: the affinities of all words and regions, and their softmax.

    `columns` of a tile are one image's.
    """
    tiles = blocks(int(p.N / TILES.fill), TILES.words)
    images = max(1, TILES.regions // p.R)  # of a tile
    groups, walks = blocks(p.I, images), blocks(p.I, TILES.images)
    done = Count(tiles * groups)
    done.reads("words", p.N * p.D * p.size * walks, p.N * p.D * p.size * groups)
    done.reads("image", p.I * p.R * p.D * p.size, p.I * p.R * p.D * p.size * tiles)
    done.reads("factor", p.I * p.R**2 * 4, p.I * p.R**2 * 4 * tiles)
    done.dots(tiles * groups, TILES.words, images * columns, p.D, p.kind)
    # bfloat16 would lose digits of the softmax's weights.
    weights = "tf32" if p.kind == "bfloat16" else p.kind
    done.dots(tiles * p.I, TILES.words, _up(p.R, TILES.pitch), _up(p.R, 16), weights)
    done.vector = tiles * groups * TILES.words * images * columns * 14
    return done


def _up(n: int, size: int) -> int:
    return blocks(n, size) * size


def _scan(p: Problem) -> Iterator[tuple[str, Count]]:
    yield from _prepared(p)
    lengths = Count(blocks(p.N, 8))
    lengths.reads("words", p.N * p.D * p.size, p.N * p.D * p.size)
    lengths.writes("length", p.N * 4)
    lengths.vector = p.N * p.D * 3
    yield "lengths", lengths
    scan = _affinities(p, p.R)
    scan.writes("score", p.I * p.T * p.given)
    yield "scan_t2i", scan


def _nodes(p: Problem) -> tuple[Count, list[tuple[int, int]]]:
    """All that makes nodes in shared memory; and (rows of a tile, tiles of all images)."""
    nodes = node_plan(node_bounds(p.edge), p.N + p.T, "traffic", TILES.nodes(p.card.arch or 75, p.size), p.N + p.T)
    tiles = [(t.size, t.number * p.I) for window in nodes.windows for t in window.tiles]
    number = sum(n for _, n in tiles)
    done, walks = Count(number), blocks(p.I, TILES.images)
    done.reads("words", p.N * p.D * p.size * walks, p.N * p.D * p.size * p.I)
    done.reads("image", p.I * p.R * p.D * p.size, number * p.R * p.D * p.size)
    done.reads("local weight", p.S * p.D * p.size, number * p.S * p.D * p.size)
    weights = p.N * p.I * _up(p.R, TILES.pitch) * p.size
    done.reads("weights", weights, weights)
    done.reads("global nodes", p.I * p.T * p.S * p.size, p.I * p.T * p.S * p.size)
    for rows, n in tiles:
        done.dots(n, rows, p.D, _up(p.R, 16), p.kind)
        done.dots(n, rows, p.S, p.D, p.kind)
        done.vector += n * rows * (p.D * (8 if p.size == 4 else 5) + p.S * 5)
    return done, tiles


def _before_nodes(p: Problem) -> Iterator[tuple[str, Count]]:
    yield from _prepared(p)
    pitch = _up(p.R, TILES.pitch)
    weights = _affinities(p, pitch)
    weights.writes("weights", p.N * p.I * pitch * p.size)
    yield "weights", weights
    tiles = blocks(p.T, TILES.captions) * p.I
    overall = Count(tiles)
    overall.reads("globals", (p.I + p.T) * p.D * p.size, (p.T * p.I + tiles) * p.D * p.size)
    overall.reads("global weight", p.S * p.D * p.size, tiles * p.S * p.D * p.size)
    overall.writes("global nodes", p.I * p.T * p.S * p.size)
    overall.dots(tiles, TILES.captions, p.S, p.D, p.kind)
    overall.vector = tiles * TILES.captions * (p.D * (6 if p.size == 4 else 3) + p.S * 5)
    yield "global_nodes", overall


def _graph(p: Problem) -> Iterator[tuple[str, Count]]:
    yield from _before_nodes(p)
    done, tiles = _nodes(p)
    for name in ("ask", "value"):
        done.reads(name, p.K * p.S**2 * p.size, done.programs * p.K * p.S**2 * p.size)
    for rows, n in tiles:
        halves = blocks(rows, TILES.half)
        for step in range(p.K):
            few = halves * TILES.first if step == p.K - 1 else rows
            done.dots(2 * n, few, p.S, p.S, p.kind)
            done.dots(2 * n, few, p.S, TILES.half, p.kind)
            done.vector += n * few * (p.S * 8 + TILES.half * 8)
    done.writes("score", p.I * p.T * p.given)
    yield "graph_scores", done


def _filter(p: Problem) -> Iterator[tuple[str, Count]]:
    yield from _before_nodes(p)
    done, tiles = _nodes(p)
    for rows, n in tiles:
        done.vector += n * rows * p.S * 5
    done.writes("score", p.I * p.T * p.given)
    yield "filter_scores", done
