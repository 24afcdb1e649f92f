"""What the bench_<op>.py files share: one benchmark of one op call on a named shape, forward or with backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import itm_fast.ops  # each op declares its backends in _backends.OFFERS
from benchmarks.harness import backends, synchronise
from benchmarks.shapes import SHAPES
from itm_fast import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def over(op: str):
    """Parametrise a benchmark over the op's backends (the reference left out) x shapes x passes."""

    def wrap(function):
        for mark in (
            pytest.mark.parametrize("backend", [b for b in _backends.OFFERS[op] if b != "reference"]),
            pytest.mark.parametrize("shape", ["quick", "coco-train-b128"]),
            pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"]),
        ):
            function = mark(function)
        return function

    return wrap


def features(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    return SHAPES[shape].features(DEVICE)


def nodes(shape: str, S: int) -> tuple[Tensor, Tensor]:
    """Similarity vectors of a shape's pairs, global node first, and their bounds."""
    known = SHAPES[shape]
    counts = torch.tensor([0, *(n + 1 for n in known.lengths)])
    cu_seqlens = counts.cumsum(0).to(device=DEVICE, dtype=torch.int32)
    x = torch.randn(known.images, int(counts.sum()), S, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(x, dim=-1).to(DEVICE), cu_seqlens


def run(benchmark, shape: str, backend: str, backward: bool, call: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Time `call(*leaves)` under a backend; pairs per second go into the extra information."""
    if backend not in backends(DEVICE):
        pytest.skip(itm_fast.why_not(backend, DEVICE) or "an interpreter is not timed")
    leaves = [x.detach().requires_grad_(backward) for x in leaves]

    def once() -> None:
        with itm_fast.use_backend(backend):
            result = call(*leaves)
            if backward:
                torch.autograd.grad(result.sum(), leaves)
        synchronise()

    benchmark.extra_info.update(torch=torch.__version__, device=DEVICE, threads=torch.get_num_threads())
    benchmark.pedantic(once, rounds=3, warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable, and under pytest-xdist
        benchmark.extra_info["pairs_per_second"] = SHAPES[shape].pairs / benchmark.stats.stats.median
