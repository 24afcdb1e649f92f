"""A training batch divided among the processes of a run, with the losses and gradients of one process.

Of a batch of B captions, the process of rank r encodes captions r, r + W, r + 2 W, ... and their images, W being the
number of processes. Every process computes the same loss of the whole batch. Its gradients are those of one process:

    gather    copies the rows of all processes to each; its backward pass adds up all processes' gradients of a row,
    sum       adds up a tensor over the processes; its backward pass adds up their gradients,
    average   takes the mean of the parameters' gradients over the processes, after the backward pass.

The sums of the backward passes count the loss W times, once for each process, and the average divides by W.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ._ranks import Ranks


@dataclass(frozen=True)
class Share:
    """What one process has of a training batch of B captions, each with its image.

    Attributes:
        ranks: the processes among which the batch is divided.
        lengths: [B], the words of all captions of the batch.
        rows: the places in the batch of this process's captions: r, r + W, ..., or all.
        part: those of its captions that are being encoded.
        masks: the dropout masks that were drawn, for this process's rows, by module and how often it was called before.
        calls: how often each dropout module was called for this part.
    """

    ranks: Ranks
    lengths: Sequence[int]
    rows: range
    part: slice = field(default_factory=lambda: slice(None))
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    @property
    def divided(self) -> bool:
        """Whether other processes have other captions of the batch."""
        return len(self.rows) < len(self.lengths)

    @contextlib.contextmanager
    def active(self, part: slice = slice(None)) -> Iterator[None]:
        """Inside the `with`, `share()` returns this, with that part of its captions being encoded."""
        token = _share.set(dataclasses.replace(self, part=part, calls={}))
        try:
            yield
        finally:
            _share.reset(token)

    def whole(self, x: Tensor) -> Tensor:
        """Rows of this process's captions (or images) [len(rows), ...] -> of all, in the batch's order, [B, ...]."""
        B, W = len(self.lengths), self.ranks.world
        order = [row for rank in range(W) for row in range(rank, B, W)]
        return self._in_order(x, [len(range(rank, B, W)) for rank in range(W)], order, [1] * B)

    def whole_words(self, x: Tensor) -> Tensor:
        """Rows of the words of this process's captions -> of all captions of the batch, one after another."""
        B, W = len(self.lengths), self.ranks.world
        order = [row for rank in range(W) for row in range(rank, B, W)]
        counts = [sum(self.lengths[row] for row in range(rank, B, W)) for rank in range(W)]
        return self._in_order(x, counts, order, self.lengths)

    def _in_order(self, x: Tensor, counts: list[int], order: list[int], sizes: Sequence[int]) -> Tensor:
        """Gather rows; item `order[k]` of the batch, with `sizes[order[k]]` rows, is the k-th that arrives."""
        size = torch.tensor([sizes[item] for item in order])
        start = torch.empty_like(size)
        start[torch.tensor(order)] = size.cumsum(0) - size
        size = torch.tensor(list(sizes))
        shift = start - (size.cumsum(0) - size)
        index = shift.repeat_interleave(size) + torch.arange(int(size.sum()))
        return self.ranks.gather(x, counts)[index.to(x.device)]

    def of_rows(self, whole: Tensor) -> Tensor:
        """This process's rows of what all captions, or images, of the batch have: [B, ...] -> [len(rows), ...]."""
        return whole[self.rows.start :: self.rows.step]

    def dropout(self, module: nn.Dropout, x: Tensor) -> Tensor:
        """Dropout of rows [n, ...] that belong to the captions, or images, being encoded.

        The mask is drawn once, for all B rows of the batch, as one process would draw it.
        """
        if not module.training or not module.p:
            return x
        key = id(module), self.calls.get(id(module), 0)
        self.calls[id(module)] = key[1] + 1
        mask = self.masks.get(key)
        if mask is None:
            drawn = nn.functional.dropout(x.new_ones(len(self.lengths), *x.shape[1:]), module.p)
            mask = self.masks[key] = self.of_rows(drawn) != 0
        return x * (mask[self.part].to(x.dtype) / (1 - module.p))


_share: contextvars.ContextVar[Share | None] = contextvars.ContextVar("itm_fast_share", default=None)


def share() -> Share | None:
    """What this process has of the batch that is being encoded or scored; None outside `Share.active`."""
    return _share.get()
