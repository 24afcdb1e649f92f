"""The bound on the scratch memory of ops and pair scorers: all memory beyond inputs and results."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

GIB = 1 << 30
DEFAULT_GIB = 1.0  # the bound, in GiB, outside any `workspace`
_limit: contextvars.ContextVar[float] = contextvars.ContextVar("itm_fast_workspace", default=DEFAULT_GIB)


@contextlib.contextmanager
def workspace(gib: float) -> Iterator[None]:
    """Bound the scratch memory of every op and pair scorer inside the `with`.

    Inputs and results do not count, and gradients are results. A backward pass has the bound of its forward pass.
    Scores do not depend on the bound. Beside it, each call of few pairs by "torch" on a CPU keeps up to a quarter
    of the bound, but not more than 160 MiB, until its backward pass.

    Args:
        gib: the bound in GiB, more than 0. Outside any `with` it is 1.

    Raises:
        ValueError: the bound is not a positive number.

    >>> import torch, itm_fast
    >>> image, words, cu_seqlens = torch.randn(2, 3, 8), torch.randn(5, 8), torch.tensor([0, 2, 5])
    >>> with itm_fast.workspace(0.25):
    ...     itm_fast.cross_attention_score(image, words, cu_seqlens).shape
    torch.Size([2, 2])
    """
    if not hasattr(gib, "__float__") or not gib > 0:
        raise ValueError(f"workspace: gib must be more than 0, got {gib!r}")
    token = _limit.set(float(gib))
    try:
        yield
    finally:
        _limit.reset(token)


def current_gib() -> float:
    """The current bound in GiB, for a later `workspace(...)` to restore."""
    return _limit.get()


def scratch_bytes(device: torch.device) -> int:
    """The current bound in bytes; the same for every device."""
    return int(_limit.get() * GIB)
