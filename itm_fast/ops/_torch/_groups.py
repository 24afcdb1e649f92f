"""Captions that an op in batched PyTorch takes together, sorted by length or as they follow each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...packing import Index, Run, runs, starts
from ._attention import valid


class Group(NamedTuple):
    """Captions of several lengths: `sets` of (length, how many), whose rows `rows` follow each other in that order.
    `members`: the captions as Python integers, as reading `captions` back would wait for a GPU."""

    sets: list[tuple[int, int]]
    members: Sequence[int]
    captions: Index
    rows: Index


class Padding:
    """Pads the words of captions to the longest: `real` bool [1, c, longest], None if all have one length."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.shape = lengths, (len(lengths), max(lengths))
        self.real: Tensor | None = None
        if min(lengths) < max(lengths):
            real = valid(torch.tensor(lengths), max(lengths))
            self.place, self.real = real.flatten().nonzero().flatten().to(device), real.to(device)[None]

    def __call__(self, x: Tensor) -> Tensor:
        """[b, words of all captions, ...] -> [b, c, longest, ...], with zeros."""
        if self.real is not None:
            x = x.new_zeros(len(x), self.real.numel(), *x.shape[2:]).index_copy(1, self.place, x)
        return x.unflatten(1, self.shape)

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
