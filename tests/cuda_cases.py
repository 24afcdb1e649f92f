"""A small CUDA kernel for tests of the driver and of the compiler: y = a x + b, of which b is a template argument."""

import ctypes
from pathlib import Path

from itm_fast import _native
from itm_fast._cuda import Kernel


class Affine(ctypes.Structure):
    """The argument of `affine` (cuda/affine.cu)."""

    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int), ("a", ctypes.c_float))


KERNEL = Kernel("affine.cu", "affine<3>", Affine, threads=32, shared=128)


def own_sources(monkeypatch, folder):
    """Let a copy of the kernel be all of csrc/cuda, and the cache folder be empty; both lie in a folder."""
    sources = folder / "csrc" / "cuda"
    sources.mkdir(parents=True)
    for file in ("affine.cu", "affine.cuh"):
        (sources / file).write_text((Path(__file__).parent / "cuda" / file).read_text())
    monkeypatch.setattr(_native, "csrc_dir", lambda: sources.parent)
    monkeypatch.setenv("ITM_FAST_CACHE_DIR", str(folder / "cache"))
    return sources
