"""Compiled kernels, one for each architecture, in the cache folder that the C++ library has too.

An entry is named by a digest of its sources, the options, NVRTC's release and the architecture.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _native
from .._native import Unavailable, cache
from . import nvrtc
from .layout import layout_checks

FILE = "kernel.cubin"
_locks: dict[str, threading.Lock] = {}  # of each kernel that is being compiled, by the name of its entry
_lock = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """A kernel of csrc/cuda, and how it is launched.

    Args:
        source: the name of its .cu file there.
        name: the kernel as a C++ expression, such as "scan_t2i<F16X3, 36>".
        structure: the twin of its one argument, under the struct's name in C++.
        threads: in a block.
        shared: bytes of dynamic shared memory of a block.
        specific: whether it needs instructions that only GPUs of one architecture have, as wgmma of compute capability
            9.0; it is then compiled for sm_90a.
        cluster: blocks of a cluster, neighbours in y; blocks in y are a multiple of it.
    """

    source: str
    name: str
    structure: type[ctypes.Structure]
    threads: int
    shared: int
    specific: bool = False
    cluster: int = 1


def build(kernel: Kernel, architecture: int) -> nvrtc.Compiled:
    """A kernel's code for an architecture, from the cache folder or compiled and kept there.

    Raises:
        Unavailable: there is no NVRTC.
        RuntimeError: the kernel does not compile.
    """
    name, source, headers = _entry(kernel, architecture)
    with _lock:
        own = _locks.setdefault(name, threading.Lock())
    with own:
        if found := cache.find(name, _load):
            return found
        made = nvrtc.compile(source, kernel.source, headers, kernel.name, architecture, kernel.specific)
        try:
            with cache.scratch("CUDA kernels") as (scratch, kept):
                if kept:
                    known = dict(kernel=kernel.name, architecture=architecture, origin=_origin(kernel.source))
                    _keep(made, scratch / "result", **known)
                    cache.publish(scratch / "result", scratch.parent / name, _load)
        except Unavailable as error:  # such as a full disk: this process has what it needs
            warnings.warn(f"itm-fast compiles its CUDA kernels anew in every process: {error}", stacklevel=2)
        return made


def _entry(kernel: Kernel, architecture: int) -> tuple[str, str, dict[str, str]]:
    """The name of a kernel's entry, and the text and the headers that it is compiled from."""
    checks = layout_checks(kernel.structure, kernel.structure.__name__)
    name = _digest(kernel.name, architecture, kernel.specific, checks, _origin(kernel.source))
    texts = _texts()
    headers = {file: text for file, text in texts.items() if not file.endswith(".cu")}
    return f"cubin-sm_{architecture}-{name}", texts[kernel.source] + checks, headers


def _origin(source: str) -> str:
    """A digest of what all kernels of a .cu file are compiled from, and of what compiles them."""
    texts = [text for text in _texts().items() if text[0] == source or not text[0].endswith(".cu")]
    return _digest(nvrtc.OPTIONS, nvrtc.release(), source, sorted(texts))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _texts() -> Mapping[str, str]:
    return _sources(_native.csrc_dir() / "cuda")


@functools.cache
def _sources(folder: Path) -> Mapping[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.iterdir()) if file.suffix in (".cu", ".cuh", ".h")}


def _keep(made: nvrtc.Compiled, folder: Path, **known: Any) -> None:
    folder.mkdir(mode=0o755)  # all users may use a kernel that root compiled, but not change it
    (folder / FILE).write_bytes(made.code)
    cache.note(folder, FILE, **known, nvrtc=nvrtc.library().version, **dict(zip(made._fields[1:], made[1:])))


def _load(folder: Path) -> nvrtc.Compiled:
    found = cache.facts(folder, FILE)
    try:
        known = {field: found[field] for field in nvrtc.Compiled._fields[1:]}
    except KeyError as error:
        raise ValueError(f"{folder} is damaged: it does not say {error}") from error
    cache.mark_used(folder)
    return nvrtc.Compiled((folder / FILE).read_bytes(), **known)


def kept() -> list[dict[str, Any]]:
    """What is known about every kernel in the cache folder: kernel, architecture, nvrtc, registers, spilled, shared,
    and `current`: whether it was compiled from these sources, by the NVRTC that is here. Marks none as used."""
    found = list(cache.entries("cubin-*", lambda folder: cache.facts(folder, FILE)))
    known = bool(found) and nvrtc.why_not() is None
    current = {_origin(file) for file in _texts() if file.endswith(".cu")} if known else set()
    for kernel in found:
        kernel["current"] = kernel.pop("origin", None) in current
    return found
