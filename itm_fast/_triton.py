"""Whether the Triton kernels run on a device: what they need, and a check of each op's on its first use there.

Some versions of Triton compile some kernels wrongly for some GPUs. So the first time that an op would run on a device
in a precision, a problem of two captions goes through it and through the reference. An op that fails is put aside for
the life of the process; the others keep their kernels.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading

import torch

from ._checks import matmul_precision

REGIONS = 128  # of an image, that hierarchical_alignment_score takes at most
LEAST = (8, 0)  # compute capability: bfloat16 and TF32 products, asynchronous copies
_TRUE = ("1", "true", "yes", "on", "y")  # as Triton reads its own switches
_verdicts: dict[tuple, str | None] = {}
_lock = threading.Lock()
_thread = threading.local()  # .checks: the check itself runs there, and is not to be checked


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on any device and far more slowly than it runs them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def why_not(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """None when Triton can run here, else one sentence a user can act on."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"needs CUDA tensors, got {device.type}"
    if dtype == torch.float64:
        return "its kernels compute in float32 at best and so take no float64; torch and reference do"
    if problem := _unusable():
        return problem
    if interpreted():
        return None
    if torch.version.hip:
        return "its kernels are written for NVIDIA GPUs, and this torch is built for ROCm"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST:
        name = torch.cuda.get_device_name(device)
        wanted = ".".join(map(str, LEAST))
        return f"needs a GPU of compute capability {wanted} or more, and {name} has {'.'.join(map(str, found))}"
    return None


@functools.cache
def _unusable() -> str | None:
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed; `pip install triton`"
        return f"triton does not import: {error}"
    except Exception as error:  # a package built for another Python or torch may raise anything
        return f"triton does not import: {type(error).__name__}: {error}"
    return None


def put_aside(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Check an op's kernels on a device where that is still to be done.

    Backward kernels are checked when gradients are recorded, so that an evaluation compiles none. Nothing is checked
    while a CUDA graph is captured, which allows no other work on the device, and nothing under the interpreter.

    Returns:
        None when the op may run, else why its kernels are put aside.
    """
    if getattr(_thread, "checks", False) or interpreted() or _capturing(device):
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
    from .testing.examples import problem

    found: list[str | None] = []
    raised: list[BaseException] = []

    def work() -> None:
        _thread.checks = True
        try:
            found.append(problem(op, "triton", device, dtype, backward))
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
