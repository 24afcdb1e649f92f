"""The count of one launch: what it reads, writes and computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cards import Card


@dataclass
class Use:
    """How one launch uses one part of a tensor.

    Attributes:
        place: tells this part apart from all others; two launches that use it have the same.
        distinct: bytes of the part, each once.
        requested: bytes that all programs load or store, masked elements left out.
        written: whether it is stored.
    """

    place: tuple[Any, ...]
    distinct: int
    requested: int
    written: bool


@dataclass
class Count:
    """What one launch does.

    Attributes:
        programs: of its grid.
        launches: that are counted together.
        uses: of tensors of floats.
        products: operations by their kind, as in `cards.PRODUCTS`, multiply-add = 2; tiles as they are, padding too.
        vector: float32 instructions outside matrix products, an estimate.
        shared: bytes through shared memory: copies that land, ldmatrix and factors of wgmma; CUDA kernels only.
        plain: those of threads' own loads and stores, of some kernels an estimate; CUDA kernels only.
        by_mma: whether products are made by the instructions mma.sync, which warps wait for, on a card that has others.
        by_wgmma: of `products`, those that are made by these others all the same.
    """

    programs: int
    launches: int = 1
    uses: list[Use] = field(default_factory=list)
    products: dict[str, float] = field(default_factory=dict)
    vector: float = 0.0
    shared: float = 0.0
    plain: float = 0.0
    by_mma: bool = False
    by_wgmma: dict[str, float] = field(default_factory=dict)

    def reads(self, place: Any, distinct: int, requested: int) -> None:
        self.uses.append(Use((place,), distinct, requested, False))

    def writes(self, place: Any, size: int) -> None:
        self.uses.append(Use((place,), size, size, True))

    def dots(self, number: int, rows: int, columns: int, depth: int, kind: str, wgmma: bool = False) -> None:
        """Add `number` products of [rows, depth] with [depth, columns]."""
        for products in (self.products, self.by_wgmma)[: 1 + wgmma]:
            products[kind] = products.get(kind, 0.0) + 2.0 * number * rows * columns * depth

    def seconds(self, card: Card) -> float:
        """What the products take at the card's peaks; NaN where it has no products of a kind."""

        def rate(kind: str, by_mma: bool) -> float:
            return card.rate(kind, by_mma) or math.nan

        seconds = math.fsum(n / rate(kind, False) for kind, n in self.by_wgmma.items())
        for kind, n in self.products.items():
            seconds += (n - self.by_wgmma.get(kind, 0.0)) / rate(kind, self.by_mma)
        return seconds

    def requested(self, written: bool) -> int:
        return sum(use.requested for use in self.uses if use.written == written)

    def distinct(self, written: bool) -> int:
        return sum(use.distinct for use in self.uses if use.written == written)


def blocks(n: Any, size: int) -> Any:
    """How many blocks of `size` cover n, a number or a tensor of numbers."""
    return -(-n // size)
