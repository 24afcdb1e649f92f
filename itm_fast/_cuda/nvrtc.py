"""NVRTC, NVIDIA's library that compiles CUDA C++; a CUDA build of torch brings it. No GPU is needed to compile."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .._native import Unavailable
from .._native.compiling import useful

OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",  # without it, NVRTC of CUDA 12 refuses constexpr functions
    "--ptxas-options=-v",  # the log then has registers, spills and shared memory
)
_MAJORS = (13, 12)  # of the versions that are looked for
_MAPS = Path("/proc/self/maps")  # names of the libraries that this process has loaded


class Library(NamedTuple):
    """NVRTC as loaded: its functions, file, version, and what it compiles for (75 is compute capability 7.5)."""

    functions: ctypes.CDLL
    path: str
    version: str
    architectures: tuple[int, ...]


class Compiled(NamedTuple):
    """A kernel as compiled: the code for one architecture, and what ptxas says of it."""

    code: bytes
    entry: str  # the kernel's name in the code
    registers: int  # of a thread
    spilled: int  # bytes that a thread stores for want of registers
    shared: int  # bytes of shared memory beside the dynamic part
    serialized: bool = False  # whether asynchronous products (wgmma) wait for each other, which ptxas says of bad code


def why_not() -> str | None:
    """None if NVRTC is there, else one sentence."""
    found = _found()
    return found if isinstance(found, str) else None


def library() -> Library:
    """NVRTC, loaded when first asked for.

    Raises:
        Unavailable: there is none.
    """
    found = _found()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def _found() -> Library | str:
    # A cubin of another major version than torch's may be too new for the driver that torch runs on.
    major = torch.version.cuda and int(torch.version.cuda.partition(".")[0])
    for place in _places():
        with contextlib.suppress(OSError, AttributeError, RuntimeError):  # no NVRTC, or an older one
            functions = ctypes.CDLL(place)
            numbers = ctypes.c_int(), ctypes.c_int()
            _call(functions, "nvrtcVersion", *map(ctypes.byref, numbers))
            count = ctypes.c_int()
            _call(functions, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
            known = (ctypes.c_int * count.value)()
            _call(functions, "nvrtcGetSupportedArchs", known)
            version = ".".join(str(number.value) for number in numbers)
            if major in (None, numbers[0].value):
                path = next((p for p in _mapped() if Path(p).name.startswith(Path(place).name)), place)
                return Library(functions, path, version, tuple(known))
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"
    wanted = f"NVRTC {major}" if major else "NVRTC"
    return f"{wanted}, which compiles its kernels, is not there; `pip install {package}` brings it"


def release() -> str:
    """What NVRTC says of its own release, such as "release 13.5, V13.5.37" and a build's number: patches of one version
    differ in it.

    Raises:
        Unavailable: there is no NVRTC.
    """
    return _release(library().functions)


@functools.cache
def _release(functions: ctypes.CDLL) -> str:
    # nvrtcVersion tells major and minor only; the comments at the head of PTX, of an empty program too, tell the rest.
    program, call = ctypes.c_void_p(), functools.partial(_call, functions)
    call("nvrtcCreateProgram", ctypes.byref(program), b"", b"empty.cu", 0, None, None)
    try:
        call("nvrtcCompileProgram", program, 0, None)
        lines = _text(call, program, "nvrtcGetPTX").decode(errors="replace").splitlines()
    finally:
        functions.nvrtcDestroyProgram(ctypes.byref(program))
    return "; ".join(said for line in lines if line.startswith("//") and (said := line.strip("/ ")))


def _places() -> Iterator[str]:
    """Where NVRTC may be: loaded already, among NVIDIA's Python packages, which torch needs, or on the system."""
    yield from _mapped()
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        yield from sorted(map(str, Path(folder).glob("*/lib/libnvrtc.so.*")), reverse=True)
    yield from (f"libnvrtc.so.{major}" for major in _MAJORS)


def _mapped() -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(set(re.findall(r"/\S*/libnvrtc\.so[.\d]*(?=\n)", _MAPS.read_text())))
    return []


def compile(
    source: str, file: str, headers: Mapping[str, str], name: str, architecture: int, specific: bool = False
) -> Compiled:
    """Compile one kernel, or one instance of a template.

    Args:
        source: the text of the .cu file.
        file: its name, for messages.
        headers: name, as included, -> text.
        name: the kernel as a C++ expression: "scale" or "scale<float, 4>".
        architecture: 75 for compute capability 7.5.
        specific: whether to allow instructions that only this architecture has (sm_90a in place of sm_90).

    Raises:
        Unavailable: there is no NVRTC.
        RuntimeError: the source does not compile; the message has the first error.
    """
    found, program, target = library(), ctypes.c_void_p(), f"sm_{architecture}{'a' * specific}"
    call = functools.partial(_call, found.functions)
    names, texts = ((ctypes.c_char_p * len(headers))(*(t.encode() for t in ts)) for ts in (headers, headers.values()))
    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), file.encode(), len(headers), texts, names)
    try:
        call("nvrtcAddNameExpression", program, name.encode())
        options = [option.encode() for option in (f"--gpu-architecture={target}", *OPTIONS)]
        code = found.functions.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _text(call, program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            why = useful(log) or _error(found.functions, code)
            raise RuntimeError(f"NVRTC {found.version} cannot compile {name} of {file} for {target}: {why}")
        entry = ctypes.c_char_p()
        call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(entry))
        lowered = (entry.value or b"").decode()
        code = _text(call, program, "nvrtcGetCUBIN")
        return Compiled(code, lowered, *resources(log, lowered), "wgmma.mma_async instructions are serialized" in log)
    finally:
        found.functions.nvrtcDestroyProgram(ctypes.byref(program))


def _text(call: functools.partial, program: ctypes.c_void_p, name: str) -> bytes:
    """What a pair of functions, NAMESize and NAME, tells about a program."""
    size = ctypes.c_size_t()
    call(f"{name}Size", program, ctypes.byref(size))
    found = ctypes.create_string_buffer(size.value)
    call(name, program, found)
    return found.raw


def resources(log: str, entry: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and static shared memory of a kernel, from the log of ptxas.

    >>> resources(
    ...     "ptxas info    : Compiling entry function 'scale' for 'sm_75'\\n"
    ...     "ptxas         .     8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\\n"
    ...     "ptxas info    : Used 10 registers, used 1 barriers, 512 bytes smem, 376 bytes cmem[0]\\n", "scale")
    (10, 8, 512)
    """
    _, _, said = log.partition(f"Compiling entry function '{entry}'")
    said = said.partition("Compiling entry function")[0]
    patterns = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem")
    registers, spilled, shared = (int(m[1]) if (m := re.search(p, said)) else 0 for p in patterns)
    return registers, spilled, shared


def _call(functions: ctypes.CDLL, name: str, *args: object) -> None:
    if code := getattr(functions, name)(*args):
        raise RuntimeError(f"{name} failed: {_error(functions, code)}")


def _error(functions: ctypes.CDLL, code: int) -> str:
    functions.nvrtcGetErrorString.restype = ctypes.c_char_p
    return (functions.nvrtcGetErrorString(code) or b"").decode()
