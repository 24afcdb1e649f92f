"""The NVIDIA driver's library: loads compiled kernels into the context that torch uses on a device, and runs them."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from .._native import Unavailable

DEVICE = "cuda"  # the type of the devices that it runs on; tests that have no GPU replace it
SONAME = "libcuda.so.1"
_SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class Function(NamedTuple):
    """A loaded kernel, and the context that it is loaded in."""

    handle: ctypes.c_void_p
    context: ctypes.c_void_p
    name: str


def why_not() -> str | None:
    """None if the driver is there and runs, else one sentence."""
    found = _found()
    return found if isinstance(found, str) else None


def version() -> str:
    """The newest CUDA version that the driver runs, such as "13.0"."""
    number = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


@functools.cache
def _found() -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(SONAME)
    except OSError as error:
        return f"NVIDIA's driver does not load: {error}"
    pointer, count = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = [pointer, *[count] * 7, pointer, pointer, pointer]
    if code := library.cuInit(0):
        return f"NVIDIA's driver does not start: {_error(library, code)}"
    return library


def _library() -> ctypes.CDLL:
    found = _found()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def _call(name: str, *args: Any) -> None:
    library = _library()
    if code := getattr(library, name)(*args):
        _raise(library, code, name)


def _raise(library: ctypes.CDLL, code: int, what: str) -> None:
    kind = torch.OutOfMemoryError if code == _OUT_OF_MEMORY else RuntimeError
    raise kind(f"{what} failed: {_error(library, code)}")


def _error(library: ctypes.CDLL, code: int) -> str:
    """What the driver calls an error, and its description."""
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    if library.cuGetErrorName(code, ctypes.byref(name)) or library.cuGetErrorString(code, ctypes.byref(text)):
        return f"error {code}, which this driver does not know"
    return f"{(text.value or b'').decode()} ({(name.value or b'').decode()})"


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """The context of a device that torch uses too."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def load(code: bytes, entry: str, name: str, shared: int, device: torch.device) -> Function:
    """Load a compiled kernel on a device.

    Args:
        code: the cubin.
        entry: the kernel's name there.
        name: its name in messages.
        shared: bytes of dynamic shared memory that its blocks will have.
        device: where it will run.

    Raises:
        RuntimeError: it cannot be loaded, or a CUDA graph is being captured.
        torch.OutOfMemoryError: the GPU has too little memory.
    """
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name} is not loaded on {device} yet, and nothing can be loaded while a CUDA graph is captured; call "
                "the op once before the capture, with the same options and dtypes"
            )
        context = _context(torch.cuda.current_device())
        _call("cuCtxSetCurrent", context)
        _call("cuModuleLoadData", ctypes.byref(module), code)
        _call("cuModuleGetFunction", ctypes.byref(handle), module, entry.encode())
        _call("cuFuncSetAttribute", handle, _SHARED_LIMIT, shared)
    return Function(handle, context, name)


def launch(
    function: Function, problem: ctypes.Structure, grid: tuple[int, int], threads: int, shared: int,
    device: torch.device,
) -> None:  # fmt: skip
    """Run a loaded kernel on the current stream of its device; `_cuda.launch` says what the arguments are.

    Raises:
        RuntimeError: the driver refuses the launch.
    """
    library = _library()
    argument = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        # A thread that has not yet worked on the device has no context, which torch's own calls give it at need.
        _call("cuCtxSetCurrent", function.context)
        if code := library.cuLaunchKernel(function.handle, *grid, 1, threads, 1, 1, shared, stream, argument, None):
            _raise(library, code, f"launching {function.name} with {grid[0]} x {grid[1]} blocks")
