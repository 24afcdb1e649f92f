"""Bytes that the CUDA kernels move through shared memory, of which a multiprocessor has 128 a clock.

`Count.shared` is what tests/test_traffic_cuda.py finds that the emulated kernels move: copies that land, zeros too;
ldmatrix, 512 bytes a warp; and the factors of products by groups of four warps (wgmma), which read a factor
[columns, 16] once for the group, and one [64, 16] where it is not in registers. `Count.plain` is the threads' own loads
and stores, as the same test counts them within 2 %. Not counted: bank conflicts; that a load by some
lanes of a warp takes as long as one by all; and hits of L1, which shares these banks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from benchmarks.traffic_counts import Count, blocks
from itm_fast._cuda import Kernel
from itm_fast.ops._cuda import _tiles

MATRICES = 512  # bytes of ldmatrix, by a warp
EACH = 128  # bytes of a number of 4 bytes that every lane of a warp reads
WARPS = 8  # of a block of threads; each has at least 16 columns in SGR's last step (last_step.h)
FIRSTS = 8  # rows of SGR's last step: the most captions of a tile


def products(halves: int) -> int:
    """Products of 16 numbers by which a stage of 128 bytes is multiplied (`for_products` in hopper.h)."""
    return 4 if halves == 1 else 6


def affinities(done: Count, tile: _tiles.Tile, row: int, halves: int) -> None:
    """Add those of affinity.h, and of the affinities that threads write once; `row`: bytes of a word's row."""
    stages, width, warps = blocks(row, 128), tile.images * tile.columns, tile.threads // 32
    if tile.clusters:
        read = tile.slots * 128 + tile.threads // 128 * products(halves) * width * 32
    else:
        down, across = 2 if tile.side == 2 else 1, tile.warp_images * tile.columns // 8
        read = warps * 4 * (down + blocks(across, 2)) * MATRICES
    done.shared += done.programs * stages * ((tile.slots + width) * 128 + read)
    done.plain += done.programs * tile.slots * width * 4
    if tile.clusters:  # whether a block has given up: set by one thread, read by all
        done.plain += done.programs * (1 + tile.threads) * 4


@dataclass
class NodeTile:
    """A tile as `NodeTile` of csrc/cuda/nodes.h has it, with the `halves` of a number."""

    S: int
    slots: int
    depth: int
    regions: int
    halves: int
    groups: bool
    squared: bool  # whether numbers have exponents
    clusters: bool

    @property
    def kept(self) -> bool:
        """Whether threads keep in registers which words they copy, and the factors of their rows."""
        return self.groups and not self.squared

    @classmethod
    def of(cls, kernel: Kernel, halves: int) -> NodeTile:
        """The tile that a kernel's template arguments name; that of global nodes has no regions, nor what follows."""
        S, slots, depth, *more = map(int, re.findall(r"\b\d+\b", kernel.name.partition("<")[2]))
        squared, clusters = "<BF16" not in kernel.name, kernel.cluster > 1
        return cls(S, slots, depth, *more[:1] or [0], halves, kernel.specific, squared, clusters)

    @property
    def side(self) -> int:
        """Warps that share rows; each has `columns`."""
        return 1 if self.groups else 4

    @property
    def columns(self) -> int:
        return self.S // self.side

    @property
    def number(self) -> int:
        """Bytes of a number."""
        return 2 * self.halves

    @property
    def nodes(self) -> int:
        """Bytes of the tile's nodes."""
        return self.slots * self.S * self.number

    def stages(self, D: int) -> int:
        """Stages of W, and of words and regions."""
        return blocks(D, self.depth)

    def by_warps(self, rows: int, columns: int) -> int:
        """ldmatrix of a stage, where each warp multiplies so many rows and columns by mma.sync."""
        return WARPS * self.depth // 16 * self.halves * (rows + columns) // 16 * MATRICES

    def weight_stage(self, loaded: bool) -> int:
        """A stage of a matrix of weights, which lands and is multiplied; `loaded`: the other factor is ldmatrix's."""
        landing = self.S * self.depth * self.number
        if not self.groups:
            return landing + self.by_warps(self.slots * self.side // WARPS, self.columns)
        return landing + loaded * WARPS * 4 * MATRICES + 2 * products(self.halves) * self.columns * 32

    def made(self, D: int) -> tuple[int, int]:
        """Of a tile whose nodes are made: what the emulator counts, and the threads' own."""
        stages = self.stages(D)
        few = next(n for n in ((64, 128) if self.groups else (16, 32, 64, 128)) if self.regions <= n)
        found = self.slots * few * self.number + stages * (self.slots + self.regions) * self.depth * self.number
        # Numbers of slots: for copies of weights and words, factors of squares (and exponents, but in bfloat16) and the
        # nodes that are written, and written once themselves; and what each thread reads once.
        copies, factors = self.slots * self.depth * self.number // 16, self.slots * 4
        if not self.groups:
            factors *= self.depth // 16
        own = self.nodes + (not self.kept) * self.slots * few * self.number // 16 * 4
        own += self.slots * (4 * self.side + 3) * 4 + self.lengths
        own += 2 * WARPS * EACH
        own += (1 if self.kept else stages) * 4 * (copies + factors * (2 if self.squared else 1))
        if self.clusters:  # whether a block has given up: set by one thread, read by all
            own += (1 + WARPS * 32) * 4
        if self.groups:  # u, of which few weights stay in registers, and others in shared memory
            held = self.halves == 1 and self.regions <= 64
            found += stages * self.slots // 64 * self.halves * self.regions // 16 * (64 if held else 64 + 64) * 32
            found += held * WARPS * self.regions // 16 * MATRICES
        else:
            found += stages * self.slots // 16 * self.depth // 16 * self.regions // 16 * 2 * self.halves * MATRICES
        if self.groups:  # squares stay in registers
            found += stages * WARPS * self.depth // 16 * self.halves * MATRICES
        else:
            own += stages * 2 * self.slots * self.depth * self.number
        return found + stages * self.weight_stage(False), own

    @property
    def lengths(self) -> int:
        """What threads move for rows' lengths (`add_bias`): the parts of warps that share rows, which all of them read;
        and rows' exponents, which are written once."""
        found = 0 if self.groups else self.slots * (4 * self.side + 16 * self.side**2)
        return found + self.squared * self.slots * (4 + 16 * self.side)

    def overall(self, D: int) -> tuple[int, int]:
        """The same of global_nodes.cu, where a thread reads its row's exponent twice for two numbers of it."""
        stages, row = self.stages(D), self.depth * self.number
        own = stages * self.slots * (2 * row + self.squared * self.depth * 4) + self.nodes + self.lengths
        return stages * (self.weight_stage(True) + self.slots * row), own

    def filtered(self, held: float) -> float:
        """What threads move of SAF after nodes are made: the `held` ones, slots' captions, float32 sums of 16 rows."""
        return held * self.S * self.number + self.slots * 4 + self.slots // 16 * self.S * 4 + WARPS * EACH

    def by_caption(self, reads: int) -> int:
        """What threads move for a caption: for its global node, and numbers that all lanes of a warp read."""
        return self.S * self.number + reads * EACH

    def steps(self, K: int, seen: float, held: float, sees: Sees | None) -> tuple[float, float]:
        """The same of SGR's K steps, the last one at FIRSTS rows.

        `seen`: pairs of blocks of 16 rows with a weight; `held`: such blocks that hold nodes; `sees`: what warps that
        share rows look up, None by groups.
        """
        stages, columns, each = self.S // self.depth, max(16, self.S // WARPS), self.halves * MATRICES
        found = stages * (self.weight_stage(True) + self.weight_stage(False))
        if sees is None:
            # All but nodes stays in registers; read are the slots' captions, of rows and of those that they see.
            found += seen * (2 * self.S // 16 * each)
            own = self.nodes + seen * 8 * EACH + 4 * WARPS * EACH
            if self.squared:  # numbers' exponents: of the nodes before, and of those that are written
                own += 2 * WARPS * EACH + self.slots * 4
        else:
            found += self.S // 16 * each * (self.slots // 16 + seen)  # edges
            found += sees.gathered * self.side * each * (sees.rows + self.columns // 16)
            # Y, Z, X and E are written. Of a row of E each lane reads all slots' captions; of one of Z its share. Each
            # warp reads for every block of slots which ones its rows see: once, and with every 16 columns that it adds.
            own = 3 * self.nodes + self.slots**2 * (self.number + 4) + self.slots * (2 * self.S + 36)
            own += self.side * EACH * (sees.looked_up + self.columns // 16 * sees.again)
            if self.squared:  # exponents, most of them for each two numbers
                own += self.slots * (14 * self.S + 100)
        found, own = (K - 1) * found, (K - 1) * own
        loaded = WARPS * (self.depth // 16 * columns // 16 + max(1, self.depth // 32)) * each
        found += 2 * stages * (self.S * self.depth * self.number + loaded)
        # First nodes and rows of Y twice, of Z once. Nodes once, with their slots' captions; and float32 sums of 16
        # nodes twice, a row of Y, and some numbers of the block.
        own += self.S * FIRSTS * (3 * self.number + 4) + FIRSTS * self.S * self.number // 16 * 4
        own += held * (16 * self.S * self.number + self.S * 3 * 4 + 16 * EACH + 6 * EACH)
        if self.squared:  # exponents of captions: for each number of Y, for a thread's two captions, and for blocks
            own += self.S * FIRSTS * 8 + WARPS * 32 * 16 + held * 2 * EACH
        return found, own


@dataclass
class Sees:
    """What warps that share rows look up of which blocks of 16 slots these see (`gathered` in steps.h), of a tile.

    Attributes:
        rows: blocks of rows of a warp.
        gathered: pairs of a warp's rows, of those of one column, and a block of slots that any of them sees.
        looked_up: numbers that are read of all blocks: where a caption begins, and if it does before, where it ends.
        again: the same of `gathered` alone.
    """

    rows: int
    gathered: float
    looked_up: float
    again: float

    @classmethod
    def of(cls, owner: torch.Tensor, rows: int) -> Sees:
        """The mean tile, from the captions [tiles, blocks] of blocks of slots; -1: empty, and sees itself."""
        tiles, number = owner.shape
        same = (owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, :, None] | torch.eye(number, dtype=torch.bool)
        begun = same.int().argmax(2)[:, :, None] <= torch.arange(number)
        some = same.view(tiles, -1, rows, number).any(2)
        again = (some * (rows + begun.view(tiles, -1, rows, number).sum(2))).sum()
        return cls(rows, int(some.sum()) / tiles, number**2 + int(begun.sum()) / tiles, int(again) / tiles)
