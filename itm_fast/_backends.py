"""Which implementation runs: the only place that decides.

`backend=` argument > `with use_backend(...)` > the environment variable ITM_FAST_BACKEND > "auto". A name given
by the user is honoured or refused with the reason; only "auto" chooses, in the order in which the op offers.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Iterator

import torch

from . import _native

NAMES = ("triton", "cuda", "cpu", "torch", "reference")
OFFERS: dict[str, tuple[str, ...]] = {}  # op -> the backends it has, best first; filled as each op is defined
_told: set[str] = set()  # reasons that "auto" has warned of
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("itm_fast_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every op inside the `with` use one backend, and their backward passes wherever they run.

    A function that torch.compile has compiled keeps the backend it was compiled with.

    Args:
        name: "auto" or one of `NAMES`.

    Raises:
        ValueError: the name is none of these.

    >>> import torch, itm_fast
    >>> image, words, cu_seqlens = torch.randn(2, 3, 8), torch.randn(5, 8), torch.tensor([0, 2, 5])
    >>> with itm_fast.use_backend("reference"):
    ...     itm_fast.cross_attention_score(image, words, cu_seqlens).shape
    torch.Size([2, 2])
    """
    token = _chosen.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested(backend: str | None = None) -> str:
    """The name asked for, before any choice: argument, context, environment, "auto"."""
    return _known(backend or _chosen.get() or os.environ.get("ITM_FAST_BACKEND") or "auto", "backend")


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source}: no backend is called {name!r}; choose auto, {', '.join(NAMES)}")
    return name


def why_not(name: str, device: torch.device | str = "cpu") -> str | None:
    """Tell why a backend cannot run on a device.

    For "cpu" this compiles the C++ kernels when no process of this user has done so yet.

    Args:
        name: one of `NAMES`.
        device: where the tensors are.

    Returns:
        None when it can run, else one sentence a user can act on.

    >>> import itm_fast
    >>> itm_fast.why_not("torch", "cpu") is None
    True
    """
    _known(name, "why_not")
    device = torch.device(device)
    if not any(name in offered for offered in OFFERS.values()):
        return f"this version of itm-fast has no {name} kernels; use {', '.join(_present())}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if name == "cpu":
        return f"needs CPU tensors, got {device.type}" if device.type != "cpu" else _native.why_not()
    return None


def _present() -> tuple[str, ...]:
    return tuple(n for n in NAMES if any(n in offered for offered in OFFERS.values()))


def resolve(op: str, backend: str | None, device: torch.device) -> str:
    """Turn "auto" into one name. An explicit name is honoured or refused, never replaced.

    Raises:
        NotImplementedError: with one sentence per backend that was considered.
    """
    backend = requested(backend)
    offered = OFFERS[op]
    reasons: dict[str, str] = {}
    for name in offered if backend == "auto" else (backend,):
        reason = why_not(name, device)
        if reason is None and name not in offered:
            reason = f"{op} has no such backend; it offers {', '.join(offered)}"
        if reason is None:
            if device.type == "cpu" and "cpu" in reasons:
                _warn_once(reasons["cpu"], name)
            return name
        reasons[name] = reason
    raise NotImplementedError(f"{op} cannot run on {device}: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))


def _warn_once(reason: str, instead: str) -> None:
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"itm-fast runs its slower {instead} backend, as its CPU kernels cannot run: {reason}. "
            f"Setting ITM_FAST_BACKEND={instead} silences this.",
            stacklevel=4,
        )


# Resolved once per trace. This is all that torch.compiler.assume_constant_result does, but calling it imports Dynamo
# and so doubles the time of `import itm_fast`.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
