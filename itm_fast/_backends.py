"""The choice of the backend that runs an op; nothing else decides it.

The `backend=` argument comes first, then `with use_backend(...)`, the environment variable ITM_FAST_BACKEND, "auto".
A backend named by the user runs or raises with the reason; "auto" takes the first of the op's backends that can run.
One exception: when kernels are chosen for all ops, an op that has none of that kind chooses as "auto" does.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch

from . import _cuda, _native, _triton
from ._names import BACKENDS as NAMES

ON_GPU = ("triton", "cuda")  # backends whose kernels run on a GPU: each op's are checked when it first uses them
KERNELS = frozenset((*ON_GPU, "cpu"))  # backends that only some ops have
OFFERS: dict[str, tuple[str, ...]] = {}  # op -> the backends it has, best first; filled as each op is defined
TooLarge = Callable[[str], "str | None"]  # backend -> why
PutAside = Callable[[str, str, torch.device, torch.dtype], "str | None"]  # op, backend, device, dtype -> why
_told: set[str] = set()  # reasons that "auto" has already warned of
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("itm_fast_backend", default=None)
_ran: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("itm_fast_ran", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make every op called inside the `with`, and its backward pass at any later time, use one backend.

    When "triton", "cuda" or "cpu" is chosen, an op that has no such kernels chooses as for "auto":
    `hardest_negative_loss` runs in torch; with "cuda", the ops that train SAF run in triton, or in torch where triton
    cannot. A function compiled by torch.compile keeps the backend that it was compiled with.

    Args:
        name: "auto" or one of `NAMES`.

    Raises:
        ValueError: no backend has this name.

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


@contextlib.contextmanager
def recorded(into: dict[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Record the backend of every op that this thread calls inside the `with`; one around it records them at the end.

    A function compiled by torch.compile chooses its backend when it is compiled; calling it again records nothing,
    except where the choice is left to the call; see `resolve`.

    Args:
        into: the dict to fill; None: a new one.

    Yields:
        The dict, filled as ops are called: op -> backend, or "triton, torch" if calls of one op ran on both.

    >>> import torch, itm_fast
    >>> with recorded() as ran:
    ...     loss = itm_fast.hardest_negative_loss(torch.eye(3), backend="torch")
    >>> ran
    {'hardest_negative_loss': 'torch'}
    """
    ran: dict[str, str] = {} if into is None else into
    token = _ran.set(ran)
    try:
        yield ran
    finally:
        _ran.reset(token)
        for op, names in ran.items():
            for name in names.split(", "):
                _note(op, name)


def _note(op: str, name: str) -> None:
    ran = _ran.get()
    if ran is not None and name not in (known := ran.get(op, "")).split(", "):
        ran[op] = f"{known}, {name}".removeprefix(", ")


def requested(backend: str | None = None) -> str:
    """The backend that the user chose, or "auto": by the argument, else the context, else the environment variable."""
    return _known(backend or _chosen.get() or os.environ.get("ITM_FAST_BACKEND") or "auto", "backend")


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source}: no backend is called {name!r}; choose auto, {', '.join(NAMES)}")
    return name


def why_not(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> str | None:
    """Say why a backend cannot run on a device.

    For "cpu" this compiles the C++ kernels unless a process of this user has done so before. For "triton" and "cuda" it
    compiles nothing; each op's kernels are checked when the op first uses them, and may be refused then.

    Args:
        name: one of `NAMES`.
        device: device of the tensors.
        dtype: dtype of the floating-point tensors; None asks whether any dtype can run.

    Returns:
        None if the backend can run, else one sentence that says what is missing.

    >>> import itm_fast
    >>> itm_fast.why_not("torch", "cpu") is None
    True
    """
    _known(name, "why_not")
    device = torch.device(device)
    if not any(name in offered for offered in OFFERS.values()):
        return f"this version of itm-fast has no {name} kernels; use {', '.join(_present())}"
    return _cannot_run(name, device, dtype)


def _cannot_run(name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """`why_not` of a backend that some ops have."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if name == "cpu":
        return f"needs CPU tensors, got {device.type}" if device.type != "cpu" else _native.why_not()
    if name == "triton":
        return _triton.why_not(device, dtype)
    if name == "cuda":
        return _cuda.why_not(device, dtype)
    return None


def _present() -> tuple[str, ...]:
    return tuple(n for n in NAMES if any(n in offered for offered in OFFERS.values()))


def resolve(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    too_large: TooLarge | None = None,
    put_aside: PutAside | None = None,
    traced: bool = False,
) -> str:
    """Choose the backend of one call: turn "auto" into a name, and check a name given by the user.

    When `use_backend` or ITM_FAST_BACKEND chooses kernels that run on this device, but the op has none of that kind, it
    is "auto" that chooses.

    Args:
        op: name of the op.
        backend: the call's `backend` argument.
        device: device of the call's tensors.
        dtype: dtype of its floating-point tensors, before autocast; None if every backend takes all dtypes.
        too_large: backend in `ON_GPU` -> why its kernels cannot take these shapes, or None if they can.
        put_aside: returns why the kernels of a backend in `ON_GPU` must not run on a device in a dtype, or None; it
            may test them first.
        traced: whether a graph is traced, so that the captions' lengths are not known, on which it depends whether the
            kernels of "cuda" take them. Where "auto" would then take "cuda", it stays "auto": the op chooses anew
            whenever the graph runs.

    Raises:
        NotImplementedError: no backend can run; the message has a sentence for each one considered.
    """
    of_call, backend = backend, requested(backend)
    offered = OFFERS[op]
    if not of_call and backend in KERNELS and backend not in offered:
        runs = _cannot_run(backend, device, dtype and autocast_dtype(dtype, device)) is None
        backend = "auto" if runs or KERNELS.isdisjoint(offered) else backend
    reasons: dict[str, str] = {}
    for name in offered if backend == "auto" else (backend,):
        reason = _refusal(name, op, device, dtype, too_large, put_aside, automatic=backend == "auto")
        if reason is None:
            if traced and (backend, name) == ("auto", "cuda"):
                return "auto"
            if name not in KERNELS:
                _warn_once(device, dtype, reasons, name)
            _note(op, name)
            return name
        reasons[name] = reason
    raise NotImplementedError(f"{op} cannot run on {device}: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))


def backward_of_cuda(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    too_large: TooLarge | None,
    put_aside: PutAside,
) -> str:
    """The backend whose backward pass follows a forward pass in "cuda", which has none of its own: "triton" by the rule
    of `resolve` for "auto", else "torch"."""
    reason = _refusal("triton", op, device, dtype, too_large, put_aside, automatic=True)
    return "torch" if reason else "triton"


def _refusal(
    name: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    too_large: TooLarge | None,
    put_aside: PutAside | None,
    automatic: bool,
) -> str | None:
    """Why an op cannot run in a backend; None if it can. See `resolve`."""
    if name not in OFFERS[op]:
        reason = why_not(name, device, dtype)
        return reason or f"{op} has no such backend; it offers {', '.join(OFFERS[op])}"
    if name in ON_GPU and dtype is not None:
        dtype = autocast_dtype(dtype, device)
    reason = _cannot_run(name, device, dtype)
    if reason is not None or name not in ON_GPU:
        return reason
    if automatic and name == "triton" and _triton.interpreted():
        return "Triton interprets its kernels here (TRITON_INTERPRET), which only an explicit request wants"
    if too_large is not None and (reason := too_large(name)):
        return reason
    return put_aside(op, name, device, dtype) if dtype and put_aside else None


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a tensor of an op has after autocast."""
    autocast = torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if autocast else dtype


def _warn_once(device: torch.device, dtype: torch.dtype | None, reasons: Mapping[str, str], instead: str) -> None:
    """Tell, once for each reason, why no kernels run on the device; of float64 the GPU's kernels are not expected."""
    kinds = {"cpu": "CPU"} if device.type == "cpu" else {"triton": "Triton", "cuda": "CUDA"}
    if device.type != "cpu" and dtype == torch.float64:
        return
    said = (f"its {kind} kernels cannot run: {reasons[name]}" for name, kind in kinds.items() if name in reasons)
    reason = "; ".join(said)
    if reason and reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"itm-fast runs its slower {instead} backend, as {reason}. Setting ITM_FAST_BACKEND={instead} silences "
            "this.",
            stacklevel=5,
        )


# Resolved once per trace. This is all that torch.compiler.assume_constant_result does, but calling it imports Dynamo
# and so doubles the time of `import itm_fast`.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
