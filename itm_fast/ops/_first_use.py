"""The check of an op's kernels in Triton or CUDA when it first runs on a device.

Some versions of Triton compile some kernels wrongly for some GPUs, and so may NVRTC. So before an op first runs on a
device in a precision, its result for two captions is compared with the reference. If it fails, the process does not use
these kernels of this op again ("put aside"); other ops keep theirs.

Options of words choose kernels too. Those of an op's `choosing` are checked for each of their values, as kernels that
are right for one say nothing about those for another; all others with the values of the examples alone.

Of CUDA kernels that have variants for one GPU alone, such as those by wgmma, the variants are compared with the others
too: both do the same products in another order. Where they are at fault, the op goes on with the others.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable
from functools import partial

import torch

from .. import _cuda, _triton
from .._checks import capturing, matmul_precision
from . import _examples

# (op, backend, device, precision, with backward, chosen) -> why it is put aside, or None
_verdicts: dict[tuple, str | None] = {}
_lock = threading.Lock()
_thread = threading.local()  # .checks is True in a thread that runs a check: ops that run there are not checked


def put_aside(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, chosen: tuple[tuple[str, str], ...] = ()
) -> str | None:
    """Check an op's kernels of a backend on a device, unless they have been checked before.

    Backward kernels are checked only when gradients are recorded, so an evaluation does not compile them. Nothing is
    checked while a CUDA graph is captured, as that allows no other work on the device, nor under Triton's interpreter.

    Args:
        op: name of the op.
        backend: "triton" or "cuda".
        device: where the kernels are to run.
        dtype: in which they are to run.
        chosen: as `Declaration.chosen_by` returns it.

    Returns:
        None if the op may use its kernels, else the reason why not.
    """
    interpreted = backend == "triton" and _triton.interpreted()
    if getattr(_thread, "checks", False) or interpreted or capturing(device):
        return None
    index = torch.cuda.current_device() if device.index is None and device.type == "cuda" else device.index
    precision = matmul_precision() if dtype == torch.float32 else None
    backward = torch.is_grad_enabled()
    whole, results_alone = (
        (op, backend, device.type, index, dtype, precision, with_it, chosen) for with_it in (True, False)
    )  # fmt: skip
    key = whole if backward else results_alone
    for known in (whole, key):
        if known in _verdicts:
            return _verdicts[known]
    if torch._C._current_graph_task_id() != -1:
        return None  # inside a backward pass, which would wait for the check's own backward pass: a deadlock
    with _lock:
        for known in (whole, key):
            if known in _verdicts:
                return _verdicts[known]
        try:
            problem = _checked(op, backend, torch.device(device.type, index), dtype, backward, chosen)
        except (torch.OutOfMemoryError, MemoryError):
            return None  # too little memory for the check: it says nothing about the kernels
        _verdicts[key] = problem
        return problem


def _checked(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    chosen: tuple[tuple[str, str], ...],
) -> str | None:
    """The check, after which an op does without the variants of its CUDA kernels for one GPU if these are at fault."""
    given = op, backend, device, dtype
    check = partial(_examples.problem, *given, backward)
    if chosen:
        check = partial(check, chosen=chosen)
        given = f"{op} with {', '.join(f'{name} {value!r}' for name, value in chosen)}", *given[1:]
    whole = partial(_alone, *given, check)
    problem = whole()
    while backend == "cuda" and (best := _cuda.asked_variant(op, device, dtype)):
        if not problem:
            problem = _alone(*given, partial(_examples.variants_differ, op, device, dtype, chosen))
        if not problem:
            break
        _cuda.allow_variant(op, device, dtype, best - 1)
        _cuda.drop_fault(device)
        less = "clusters of blocks" if best == _cuda.CLUSTERS else "the instructions of this GPU alone"
        warnings.warn(f"{problem}; it now runs without {less}", stacklevel=3)
        problem = whole()
    return problem


def _alone(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, check: Callable[[], str | None]
) -> str | None:
    """Run a check in a new thread, where none of the caller's modes is active: autocast, inference mode, fake
    tensors, tracing, default device, `use_backend`."""
    found: list[str | None] = []
    raised: list[BaseException] = []

    def work() -> None:
        _thread.checks = True
        try:
            found.append(check())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name=f"itm-fast checks {op}", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    if found[0] is None:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kind = str(dtype).removeprefix("torch.")
    return f"{op} in {kind} failed its check on {device} ({name}, {_compiler(backend)}): {found[0]}"


def _compiler(backend: str) -> str:
    """What has compiled a backend's kernels, and its version."""
    if backend == "cuda":
        return f"NVRTC {_cuda.nvrtc.library().version}"
    return f"Triton {importlib.import_module('triton').__version__}"
