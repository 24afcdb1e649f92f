"""Captions grouped by length, for kernels whose tiles hold one caption each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from itm_fast.packing import bounds, kept, refuse_long, stretches


class Group(NamedTuple):
    """`captions` captions of at most `size` words: `LengthPlan.order[first : first + captions]`."""

    size: int
    first: int
    captions: int


class Window(NamedTuple):
    """Consecutive captions, their words (packed rows), and their groups by length."""

    captions: slice
    rows: slice
    groups: tuple[Group, ...]


class LengthPlan(NamedTuple):
    """Captions grouped by length. `order` [T] int32: all captions, group by group."""

    order: Tensor
    windows: list[Window]


def length_plan(cu_seqlens: Tensor, rows: int, op: str, sizes: Sequence[int], window: int) -> LengthPlan:
    """Group captions by the smallest of `sizes` that holds them; see `kept`.

    Args:
        cu_seqlens: [T + 1].
        rows: number of words.
        op: name for messages.
        sizes: the most words of a caption in each group, ascending.
        window: the most words in a window; a longer caption has a window to itself.

    Raises:
        ValueError: as `bounds` does, or a caption has more words than the largest tile.
    """
    key = "lengths", rows, tuple(sizes), window
    return kept(cu_seqlens, key, lambda values: _length_plan(values, rows, op, sizes, window))


def _length_plan(values: Tensor, rows: int, op: str, sizes: Sequence[int], window: int) -> LengthPlan:
    edge = bounds(values, rows, op)
    order: list[int] = []
    windows = []
    for captions in stretches(edge, window):
        members: dict[int, list[int]] = {size: [] for size in sizes}
        for t in range(captions.start, captions.stop):
            n = edge[t + 1] - edge[t]
            refuse_long(op, t, n, "words", sizes[-1])
            members[next(size for size in sizes if n <= size)].append(t)
        groups = []
        for size, found in members.items():
            if found:
                groups.append(Group(size, len(order), len(found)))
                order += found
        windows.append(Window(captions, slice(edge[captions.start], edge[captions.stop]), tuple(groups)))
    return LengthPlan(torch.tensor(order, dtype=torch.int32).to(values.device), windows)
