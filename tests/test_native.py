"""The native library: it is built once, called with tensors, and a compiler that cannot build it ends in a sentence."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from native_cases import KNOWS_ITS_FLAGS, REAL, cache, compiler, csrc, finished, fresh, until, works

import itm_fast
from itm_fast import _native

__all__ = ["cache", "compiler", "csrc"]  # fixtures


def test_it_is_built_once_and_says_so_once(csrc, cache, capfd):
    assert works()
    assert capfd.readouterr().err.count("compiling its CPU kernels") == 1
    home = finished(cache)
    assert {p.name for p in home.iterdir()} == {"build.json", "itm_fast.so"}
    before = (home / "itm_fast.so").stat()
    fresh()
    assert works()
    assert capfd.readouterr().err == ""
    assert (home / "itm_fast.so").stat() == before
    assert _native.outcome().path == home / "itm_fast.so"


@pytest.mark.parametrize("file", ["scale.cpp", "twice.h"])
def test_changed_sources_are_built_anew(csrc, cache, file):
    assert works()
    path = csrc / "cpu" / file
    path.write_text(path.read_text() + "\n// changed\n")
    fresh()
    assert works()
    assert len(list(cache.glob("generic-*"))) == 2


def test_arguments_and_failures_cross_the_border(csrc):
    source, result = torch.ones(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    _native.call("itm_scale", source, result, True, 0.5, torch.full((1,), 0.25, dtype=torch.float64))
    assert result[0] == 1.25
    assert result[1:].isnan().all()
    with pytest.raises(RuntimeError, match=r"^n is negative$"):
        _native.call("itm_scale", source, result, -1, 1.0, None)
    with pytest.raises(MemoryError, match=r"^out of memory: too many$"):
        _native.call("itm_scale", source, result, 1 << 40, 1.0, None)
    with pytest.raises(AssertionError, match="contiguous"):
        _native.call("itm_scale", torch.ones(3, 2)[:, 0], result, 3, 1.0, None)
    with pytest.raises(AssertionError, match="host memory"):
        _native.call("itm_scale", torch.ones(3, device="meta"), result, 3, 1.0, None)


def test_threads_that_ask_at_once_share_one_build(csrc, monkeypatch):
    built, real = [], _native.build
    monkeypatch.setattr(_native, "build", lambda *a: built.append(a) or time.sleep(0.1) or real(*a))
    threads = [threading.Thread(target=_native.why_not) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize(
    "capability,bf16,expected",
    [
        ("AVX512", True, "avx512_bf16"),
        ("AVX512", False, "avx512"),
        ("AVX2", True, "avx2"),
        ("DEFAULT", True, "generic"),
        ("SVE256", False, "generic"),
    ],
)
def test_the_level_is_what_torch_sees(monkeypatch, capability, bf16, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert _native.level() == expected


def test_no_compiler(csrc, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _native.why_not() == "no C++ compiler on PATH; install g++ or clang++, or set CXX"
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler on PATH"):
        _native.call("itm_scale")


def test_a_build_serves_where_no_compiler_is(csrc, monkeypatch, tmp_path):
    assert works()
    monkeypatch.setenv("PATH", str(tmp_path))
    fresh()
    assert works()


def test_cxx_names_nothing(csrc, monkeypatch):
    monkeypatch.setenv("CXX", "g+++ -m64")
    assert "CXX names 'g+++', which cannot be run" in _native.why_not()


def test_cxx_may_have_arguments(csrc, monkeypatch):
    monkeypatch.setenv("CXX", f"env SOME=1 {REAL}")
    assert works()


def test_a_compiler_that_is_too_old(csrc, compiler):
    compiler("echo \"cc1plus: error: unrecognized command line option '-std=c++20'\" >&2; exit 1")
    reason = _native.why_not()
    assert "fake-c++ (g++ (of the tests) 9.9.9) cannot compile C++20 (cc1plus: error: unrecognized" in reason
    assert reason.endswith("install GCC 11 or newer, or set CXX")


def test_a_compiler_that_is_broken(csrc, compiler):
    compiler("exit 0").write_text("#!/bin/sh\necho lost its libraries; exit 127\n")
    assert re.search("fake-c\\+\\+ --version fails: lost its libraries", _native.why_not())
    compiler("exit 0").write_text("neither a script nor a program")
    fresh()
    assert re.search("fake-c\\+\\+ cannot be run: .*Exec format error", _native.why_not())


def test_a_compiler_that_does_not_know_the_processor(csrc, compiler, cache):
    compiler('for a; do [ "$a" = -mavx2 ] && { echo "error: what is $a?"; exit 1; }; done; exec REAL "$@"')
    assert _native.build(csrc, "avx2").level == "generic"
    (home,) = cache.glob("avx2-*")
    assert home.name.startswith("avx2-")  # where the next process looks
    assert _native.build(csrc, "avx2").level == "generic"


def test_sources_that_do_not_compile(csrc, cache):
    (csrc / "cpu" / "wrong.cpp").write_text("int f() { return unheard_of; }")
    reason = _native.why_not()
    assert re.search(r"do not compile with .*: .*wrong\.cpp:1:18: error: .*unheard_of", reason)
    (log,) = cache.glob("*.log")
    assert str(log) in reason
    assert "unheard_of" in log.read_text()


def test_a_linker_that_fails(csrc, compiler):
    compiler('case "$*" in *-shared*) exec REAL "$@" -litm_nowhere;; *) exec REAL "$@";; esac')
    assert re.search(r"do not compile with .*: .*litm_nowhere", _native.why_not())


def test_a_result_that_does_not_load(csrc, compiler, cache):
    compiler(f'{KNOWS_ITS_FLAGS}\nwhile [ "$1" != -o ]; do shift; done; echo text > "$2"')
    assert "compiled but do not load" in _native.why_not()
    assert not list(cache.iterdir())  # nor objects, which may be what is wrong


def test_a_compiler_that_hangs_is_stopped_with_its_children(csrc, compiler, cache, tmp_path, monkeypatch):
    compiler(f"{KNOWS_ITS_FLAGS}\nsleep 600 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(_native.compiling, "SECONDS", 2)
    begun = time.monotonic()
    assert "did not finish in time and was stopped" in _native.why_not()
    assert time.monotonic() - begun < 20
    child = int((tmp_path / "child").read_text())
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split())
    assert [path.name.split("-")[0] for path in cache.iterdir()] == ["objects"]


def test_one_failure_stops_the_other_compilers(csrc, compiler, tmp_path):
    (csrc / "cpu" / "slow.cpp").write_text("")
    compiler('case "$*" in *slow*) sleep 60;; *) echo error: no; exit 1;; esac')
    begun = time.monotonic()
    assert "error: no" in _native.why_not()
    assert time.monotonic() - begun < 20


def test_nothing_is_built_by_importing(tmp_path):
    code = "import itm_fast, itm_fast.models; from itm_fast import _native; print(_native._outcome)"
    environment = {**os.environ, "PYTHONPATH": str(Path(itm_fast.__file__).parents[1])}
    environment["ITM_FAST_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("None", "")
    assert not (tmp_path / "cache").exists()


def test_the_kernels_are_plain_cpp():
    files = [*_native.csrc_dir().rglob("*.h"), *_native.csrc_dir().rglob("*.cpp")]
    assert files
    assert not [f.name for f in files if re.search(r"#\s*include\s*[<\"](torch|ATen|c10|pybind|Python)", f.read_text())]


@pytest.mark.parametrize("level", ["avx2", "generic"])
def test_the_kernels_compile_for_lesser_processors(level):
    built = _native.build(_native.csrc_dir(), level)
    assert built.level == level or os.uname().machine not in ("x86_64", "AMD64")
