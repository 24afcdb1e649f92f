"""Small C++ sources, compilers that misbehave and a cache folder of their own, for the tests of the native build."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import itm_fast
from itm_fast import _native

SOURCE = """
#include <cstdint>
#include "twice.h"
extern "C" const char* itm_scale(const double* from, double* to, int64_t n, double factor, const double* shift) {
    if (n < 0) return "n is negative";
    if (n > 1000) return "out of memory: too many";
    for (int64_t k = 0; k < n; ++k) to[k] = twice(from[k]) * factor + (shift ? *shift : 0.0);
    return nullptr;
}
"""
REAL = next(name for name in ("c++", "g++", "clang++") if _native.shutil.which(name))


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


def works():
    """The library is there and computes."""
    assert _native.why_not() is None
    source, result = torch.arange(4.0, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
    _native.call("itm_scale", source, result, 4, 3.0, None)
    return result.tolist() == [0, 6, 12, 18]


def fresh():
    """What another process would find."""
    _native._outcome = None
    _native._functions.clear()


def in_a_process(csrc, **environment):
    """The same build in a process of its own."""
    code = (
        "from pathlib import Path; from itm_fast import _native\n"
        f"print(_native.build(Path({str(csrc)!r}), 'generic').path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(itm_fast.__file__).parents[1]), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
