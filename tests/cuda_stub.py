"""A process without a GPU that launches CUDA kernels: the stand-in of the driver (cuda/stub_driver.cpp) hands each
launch to a function, and tensors of the CPU stand for the device's."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from itm_fast import _cuda
from itm_fast._cuda import cubins, driver, nvrtc
from itm_fast._native import compiling

_Run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_uint] * 5)
ARCHITECTURES = (75, 80, 86, 90, 100, 120)


@functools.cache
def _built() -> tuple[ctypes.CDLL, tempfile.TemporaryDirectory[str]]:
    """The stand-in of libcuda.so.1, compiled once in each process, and the folder that it lies in.

    Raises:
        Unavailable: there is no C++ compiler.
    """
    command = compiling.find_compiler().command
    source, folder = Path(__file__).with_name("cuda") / "stub_driver.cpp", tempfile.TemporaryDirectory()
    path = f"{folder.name}/libcuda.so.1"
    subprocess.run([*command, "-std=c++20", "-O1", "-shared", "-fPIC", str(source), "-o", path], check=True)
    return ctypes.CDLL(path), folder


class _Device:
    """torch.cuda.device and torch.cuda.current_device, for devices that are not there."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.index = device.index or 0

    def __enter__(self) -> None:
        self.before, _Device.current = _Device.current, self.index

    def __exit__(self, *_: object) -> None:
        _Device.current = self.before


def fail(name: str, code: int) -> None:
    """Let the driver's next call of a function fail with an error code."""
    _built()[0].itm_stub_fail(name.encode(), code)


def _uncompiled(kernel: cubins.Kernel, architecture: int) -> nvrtc.Compiled:
    return nvrtc.Compiled(b"\x7fELFstub" + kernel.name.encode(), kernel.name, 1, 0, 0)


@contextlib.contextmanager
def installed(
    run: Callable[..., object], order: int = 0, capability: tuple[int, int] = (9, 0), compiles: bool = False
) -> Iterator[SimpleNamespace]:
    """Inside the `with`, the CUDA kernels run on CPU tensors as on a GPU.

    Args:
        run: called for every launch as run(name, address of the argument, blocks in x, blocks in y, threads, bytes of
            shared memory, order), as the emulated kernels are. What it raises is printed, and the launch fails. The
            name is the kernel's own, or that in its code if NVRTC `compiles`.
        order: handed to `run`.
        capability: the compute capability of the devices.
        compiles: whether NVRTC compiles the kernels, as it does for a GPU. Else only their names are launched.

    Yields:
        What the process sees, which can be changed: capability, capturing.
    """
    stub, seen = _built()[0], SimpleNamespace(capability=capability, capturing=False)

    @_Run
    def launched(name: bytes, *args: int) -> int:
        try:
            run(name.decode(), *args)
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    stub.itm_stub_run(launched, order)
    stub.itm_stub_fail(b"", 0)
    replaced: list[tuple[Any, str, Any]] = [
        (driver, "DEVICE", "cpu"),
        (driver, "SONAME", stub._name),
        (_cuda, "_functions", {}),
        (torch.cuda, "device", _Device),
        (torch.cuda, "current_device", lambda: _Device.current),
        (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
        (torch.cuda, "is_current_stream_capturing", lambda: seen.capturing),
        (torch.cuda, "get_device_capability", lambda device=None: seen.capability),
        (torch.cuda, "get_device_name", lambda device=None: "NVIDIA Stub"),
    ]
    if not compiles:
        library = nvrtc.Library(stub, "none", "13.5", ARCHITECTURES)
        replaced += [(cubins, "build", _uncompiled), (nvrtc, "_found", lambda: library)]
    with contextlib.ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        for cached in (driver._found, driver._context):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield seen
