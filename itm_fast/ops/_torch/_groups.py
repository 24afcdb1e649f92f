"""Captions that an op in batched PyTorch takes together, sorted by length or as they follow each other."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...packing import Index, Run, runs, starts, valid


class Group(NamedTuple):
    """Captions of several lengths: `sets` of (length, how many), whose rows `rows` follow each other in that order.
    `members`: the captions as Python integers, as reading `captions` back would wait for a GPU."""

    sets: list[tuple[int, int]]
    members: Sequence[int]
    captions: Index
    rows: Index


class Padding:
    """Pads the words of captions, which have these lengths, to the longest."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device, self.shape = lengths, device, (len(lengths), max(lengths))
        self.needed = min(lengths) < max(lengths)

    def __call__(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[b, words of all captions, ...] -> [b, c, longest, ...], with `value` beyond each caption."""
        if self.needed:
            whole = x.new_full((len(x), math.prod(self.shape), *x.shape[2:]), value)
            x = whole.index_copy_(1, self._places, x)
        return x.view(len(x), *self.shape, *x.shape[2:])

    @cached_property
    def _places(self) -> Tensor:
        begin = range(0, math.prod(self.shape), self.shape[1])
        places = array("q", chain.from_iterable(range(a, a + n) for a, n in zip(begin, self.lengths)))
        return torch.frombuffer(places, dtype=torch.int64).to(self.device)  # torch.tensor of a list takes far longer

    @cached_property
    def counts(self) -> Tensor | int:
        """The lengths [c], or the one of all, for which nothing is copied to a GPU."""
        return torch.tensor(self.lengths, device=self.device) if self.needed else self.shape[1]

    @property
    def real(self) -> Tensor | None:
        """Mask of the real words, bool [1, c, longest], None if all captions have one length."""
        return valid(self.counts, self.shape[1])[None] if isinstance(self.counts, Tensor) else None

    def with_last(self) -> Tensor:
        """Places int64 [c * (longest + 1)] of rows of which each caption has one for each word and then one more: the
        words' padded, with this last one, and the last one. On the CPU."""
        length = torch.tensor(self.lengths)
        place = torch.minimum(torch.arange(self.shape[1] + 1), length[:, None])
        return (place + starts(length + 1)[:-1, None]).flatten()


def groups(
    edge: Sequence[int], device: torch.device, most: int, padded: int, times: float = math.inf
) -> Iterator[Group]:
    """Join `runs`, for one matrix product of captions of all lengths, while they have at most `most` rows together, and
    where each caption is padded to the longest, `padded` rows and `times` as many as without."""
    some: list[Run] = []
    for run in runs(edge, torch.device("cpu"), most):
        together = [*some, run]
        rows, captions = sum(one.length * one.size for one in together), sum(one.size for one in together)
        if some and (rows > most or captions * run.length > min(padded, times * rows)):
            yield _joined(some, device)
            some = []
        some.append(run)
    if some:
        yield _joined(some, device)


def in_order(edge: Sequence[int], most: int, padded: int) -> Iterator[Group]:
    """Cut captions into `groups` as they follow each other."""
    length = [b - a for a, b in pairwise(edge)]
    start = 0
    while start < len(length):
        stop, longest = start + 1, length[start]
        while stop < len(length) and edge[stop + 1] - edge[start] <= most:
            longest = max(longest, length[stop])
            if longest * (stop + 1 - start) > padded:
                break
            stop += 1
        sets = [(n, len(list(same))) for n, same in groupby(length[start:stop])]
        yield Group(sets, range(start, stop), slice(start, stop), slice(edge[start], edge[stop]))
        start = stop


def _joined(some: Sequence[Run], device: torch.device) -> Group:
    def index(places: Sequence[Index]) -> Index:
        cuts = [place for place in places if isinstance(place, slice)]
        if len(cuts) == len(places) and all(a.stop == b.start for a, b in pairwise(cuts)):
            return slice(cuts[0].start, cuts[-1].stop)
        return torch.tensor([x for place in places for x in listed(place)]).to(device)

    sets = [(run.length, run.size) for run in some]
    captions, rows = [run.captions for run in some], [run.rows for run in some]
    return Group(sets, [t for place in captions for t in listed(place)], index(captions), index(rows))


def listed(place: Index) -> Sequence[int]:
    """What an index of the CPU names, in its order."""
    return range(place.start, place.stop) if isinstance(place, slice) else place.tolist()
