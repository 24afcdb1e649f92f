"""Small C++ sources, compilers that misbehave and a cache folder of their own, for the tests of the native build."""

import ctypes
import multiprocessing
import shutil
import sys
import time

import pytest
import torch

from itm_fast import _native

SOURCE = """
#include <cstdint>
#include "twice.h"
struct Scale {
    const double* from;
    double* to;
    int64_t n;
    double factor;
    const double* shift;
};
extern "C" const char* itm_scale(const Scale& call) {
    if (call.n < 0) return "n is negative";
    if (call.n > 1000) return "out of memory: too many";
    const double shift = call.shift ? *call.shift : 0.0;
    for (int64_t k = 0; k < call.n; ++k) call.to[k] = twice(call.from[k]) * call.factor + shift;
    return nullptr;
}
extern "C" void itm_forked() {}
"""
KNOWS_ITS_FLAGS = 'case "$*" in *probe.cpp*) exit 0;; esac'  # the first thing a compiler is asked
REAL = next(name for name in ("c++", "g++", "clang++") if shutil.which(name))


class Scale(ctypes.Structure):
    _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("n", ctypes.c_int64)]
    _fields_ += [("factor", ctypes.c_double), ("shift", ctypes.c_void_p)]


def scale(source, result, n, factor, shift=None):
    """to = 2 from factor + shift, by the library."""
    pointers = [x if x is None else x.data_ptr() for x in (source, result, shift)]
    _native.call("itm_scale", ctypes.byref(Scale(*pointers[:2], n, factor, pointers[2])))


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """Small sources of the tests' own, an empty cache and a process that has loaded nothing."""
    monkeypatch.setenv("ITM_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(_native, "_outcome", None)
    monkeypatch.setattr(_native, "_functions", {})
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "scale.cpp").write_text(SOURCE)
    (tmp_path / "csrc" / "cpu" / "twice.h").write_text("inline double twice(double x) { return 2 * x; }")
    monkeypatch.setattr(_native, "csrc_dir", lambda: tmp_path / "csrc")
    monkeypatch.setattr(_native, "level", lambda: "generic")
    return tmp_path / "csrc"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Set CXX to a script; REAL stands for the real compiler. --version works as long as the script lets it."""

    def install(script, version="g++ (of the tests) 9.9.9"):
        path = tmp_path / "fake-c++"
        body = f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n'
        path.write_text(body + script.replace("REAL", REAL) + "\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return install


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def compiled(compiler, tmp_path):
    """What the real compiler was made to compile or link since the last call: names of sources, or "library"."""
    log = tmp_path / "compiled"
    compiler(
        f'for a; do case "$a" in *.cpp) echo "$(basename $a)" >> {log};; -shared) echo library >> {log};; esac; done\n'
        'exec REAL "$@"'
    )

    def since():
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(name for name in names if name != "probe.cpp")

    return since


def finished(cache):
    """The one finished build in the cache folder."""
    (home,) = cache.glob("generic-*")
    return home


def works():
    """The library is there and computes."""
    assert _native.why_not() is None
    source, result = torch.arange(4.0, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    scale(source, result, 4, 3.0)
    return result.tolist() == [0, 6, 12, 18]


def fresh():
    """What another process would find."""
    _native._outcome = None
    _native._functions.clear()


def in_a_process(csrc, said):
    """The same build in a process of its own, which begins as a copy of this one; what it says goes to a file."""

    def work():
        sys.stderr = said.open("a", buffering=1)
        _native.build(csrc, "generic")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def until(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
