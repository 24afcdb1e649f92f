"""The check of an op's Triton kernels when it first runs on a device.

Some versions of Triton compile some kernels wrongly for some GPUs. So the first time that an op would run on a device
in a precision, a problem of two captions goes through it and through the reference. An op that fails is put aside for
the life of the process; the others keep their kernels.
"""

from __future__ import annotations

import importlib
import threading

import torch

from .. import _triton
from .._checks import matmul_precision
from . import _examples

_verdicts: dict[tuple, str | None] = {}
_lock = threading.Lock()
_thread = threading.local()  # .checks: the check itself runs there, and is not to be checked


def put_aside(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Check an op's kernels on a device where that is still to be done.

    Backward kernels are checked when gradients are recorded, so that an evaluation compiles none. Nothing is checked
    while a CUDA graph is captured, which allows no other work on the device, and nothing under the interpreter.

    Returns:
        None when the op may run, else why its kernels are put aside.
    """
    if getattr(_thread, "checks", False) or _triton.interpreted() or _capturing(device):
        return None
    index = torch.cuda.current_device() if device.index is None and device.type == "cuda" else device.index
    precision = matmul_precision() if dtype == torch.float32 else None
    backward = torch.is_grad_enabled()
    whole, results_alone = ((op, device.type, index, dtype, precision, with_it) for with_it in (True, False))
    key = whole if backward else results_alone
    for known in (whole, key):
        if known in _verdicts:
            return _verdicts[known]
    if torch._C._current_graph_task_id() != -1:
        return None  # a backward pass recomputes: the check's own would wait for the thread that it holds up here
    with _lock:
        for known in (whole, key):
            if known in _verdicts:
                return _verdicts[known]
        try:
            problem = _alone(op, torch.device(device.type, index), dtype, backward)
        except (torch.OutOfMemoryError, MemoryError):
            return None  # says nothing about the kernels
        _verdicts[key] = problem
        return problem


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _alone(op: str, device: torch.device, dtype: torch.dtype, backward: bool) -> str | None:
    """Check in a thread of its own, which has none of the caller's modes: autocast, inference, fake tensors, tracing,
    the default device, the backend in use."""
    found: list[str | None] = []
    raised: list[BaseException] = []

    def work() -> None:
        _thread.checks = True
        try:
            found.append(_examples.problem(op, "triton", device, dtype, backward))
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
    return f"{op} in {kind} failed its check on {device} ({name}, Triton {_version()}): {found[0]}"


def _version() -> str:
    return importlib.import_module("triton").__version__
