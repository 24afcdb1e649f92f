"""Running a function over blocks of images x captions of one length, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._checks import work_dtype
from ..._workspace import scratch_bytes
from ...packing import Index

CPU_TILE = 8 << 20  # bytes: a block and its temporaries then stay in the last caches of a core
MIN_QUERIES = 384  # words in a block below which matrix products run far from their peak


def tile_bytes(device: torch.device, backward: bool, tiles: int = 1) -> int:
    """Scratch that one block's forward temporaries may take; backward keeps several of each.

    `tiles` is how many of CPU_TILE an op with many steps a block is fastest with.
    """
    limit = scratch_bytes(device) // (6 if backward else 2)
    return min(tiles * CPU_TILE, limit) if device.type == "cpu" else limit


class Block(NamedTuple):
    """One call: where its inputs lie in the differentiable arguments, and its result in the op's result."""

    inputs: tuple[tuple[Index, ...], ...]
    result: tuple[Index, ...]
    function: Callable[..., Tensor]


def forward(blocks: Iterator[Block], args: Sequence[Tensor], result: Tensor) -> Tensor:
    """Fill `result` block by block."""
    for block in blocks:
        value = block.function(*(a[at] for a, at in zip(args, block.inputs, strict=True)))
        result[block.result] = value.to(result.dtype)
    return result


def backward(blocks: Iterator[Block], args: Sequence[Tensor], needs: Sequence[bool], grad: Tensor) -> list[Tensor]:
    """Run each block again, differentiate it, and add up, in float32 or better: one gradient for each of `needs`."""
    work = work_dtype(grad)
    total = [torch.zeros_like(a, dtype=work) if n else None for a, n in zip(args, needs, strict=True)]
    for block in blocks:
        with torch.enable_grad():
            inputs = [
                a[at].detach().to(work).requires_grad_(n) for a, at, n in zip(args, block.inputs, needs, strict=True)
            ]
            value = block.function(*inputs)
        if not value.requires_grad:  # the options leave out all that needs a gradient
            continue
        wanted = [x for x, n in zip(inputs, needs, strict=True) if n]
        found = iter(torch.autograd.grad(value, wanted, grad[block.result].to(value.dtype), materialize_grads=True))
        for whole, at in zip(total, block.inputs, strict=True):
            if whole is not None:
                whole[at] += next(found)
    return [t for t in total if t is not None]
