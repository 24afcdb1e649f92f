"""How much scratch memory an op or a pair scorer may take beyond its inputs and its result."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

GIB = 1 << 30
DEFAULT_GIB = 1.0
_limit: contextvars.ContextVar[float] = contextvars.ContextVar("itm_fast_workspace", default=DEFAULT_GIB)


@contextlib.contextmanager
def workspace(gib: float) -> Iterator[None]:
    """Bound the scratch memory of every op and pair scorer inside the `with`.

    Inputs and results are the caller's and do not count; gradients are results, summed in float32 or better. The
    backward pass keeps the bound that its forward pass had. Scores do not depend on the bound.

    Args:
        gib: bound in GiB, more than 0. The default outside any `with` is 1.

    Raises:
        ValueError: the bound is not a positive number.

    >>> import torch, itm_fast
    >>> image, words, cu_seqlens = torch.randn(2, 3, 8), torch.randn(5, 8), torch.tensor([0, 2, 5])
    >>> with itm_fast.workspace(0.25):
    ...     itm_fast.cross_attention_score(image, words, cu_seqlens).shape
    torch.Size([2, 2])
    """
    if not gib > 0:
        raise ValueError(f"workspace: gib must be more than 0, got {gib}")
    token = _limit.set(float(gib))
    try:
        yield
    finally:
        _limit.reset(token)


def current_gib() -> float:
    """The bound in GiB that holds now, to be entered again elsewhere."""
    return _limit.get()


def scratch_bytes(device: torch.device) -> int:
    """The bound in bytes that holds on `device` now."""
    return int(_limit.get() * GIB)
