"""The native build: each way in which it can go wrong ends in a working library or in a sentence."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
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


def test_it_is_built_once_and_says_so_once(csrc, cache, capfd):
    assert works()
    assert capfd.readouterr().err.count("compiling its CPU kernels") == 1
    (home,) = cache.iterdir()
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
    assert len(list(cache.iterdir())) == 2


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
    assert "the C++ compiler cannot be run: " in _native.why_not()


def test_a_compiler_that_does_not_know_the_processor(csrc, compiler, cache):
    compiler('for a; do [ "$a" = -mavx2 ] && { echo "error: what is $a?"; exit 1; }; done; exec REAL "$@"')
    assert _native.build(csrc, "avx2").level == "generic"
    (home,) = cache.iterdir()
    assert home.name.startswith("avx2-")  # where the next process looks
    assert _native.build(csrc, "avx2").level == "generic"


def test_sources_that_do_not_compile(csrc, cache):
    (csrc / "cpu" / "wrong.cpp").write_text("int f() { return unheard_of; }")
    reason = _native.why_not()
    assert re.search(r"do not compile with .*: .*wrong\.cpp:1:18: error: .*unheard_of", reason)
    (log,) = cache.iterdir()
    assert str(log) in reason
    assert "unheard_of" in log.read_text()


def test_a_result_that_does_not_load(csrc, compiler, cache):
    compiler('while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    assert "compiled but do not load" in _native.why_not()
    assert not list(cache.iterdir())


def test_a_compiler_that_hangs_is_stopped_with_its_children(csrc, compiler, cache, tmp_path, monkeypatch):
    compiler(f"sleep 60 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(_native, "SECONDS", 0.5)
    begun = time.monotonic()
    assert "did not finish in time and was stopped" in _native.why_not()
    assert time.monotonic() - begun < 20
    child = int((tmp_path / "child").read_text())
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split())
    assert not list(cache.iterdir())


def test_one_failure_stops_the_other_compilers(csrc, compiler, tmp_path):
    (csrc / "cpu" / "slow.cpp").write_text("")
    compiler('case "$*" in *slow*) sleep 60;; *) echo error: no; exit 1;; esac')
    begun = time.monotonic()
    assert "error: no" in _native.why_not()
    assert time.monotonic() - begun < 20


def test_a_cache_folder_that_cannot_be_written(csrc, cache, tmp_path, monkeypatch):
    cache.write_text("a file where the folder should be")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(_native.tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.warns(UserWarning, match="anew in every process.*set ITM_FAST_CACHE_DIR"):
        assert works()
    assert _native.outcome().path is None
    assert not list((tmp_path / "temporary").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works()


def test_no_home_folder(csrc, monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ITM_FAST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_native.Path, "home", homeless)
    with pytest.warns(UserWarning, match="Could not determine home"):
        assert works()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ITM_FAST_CACHE_DIR", "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _native.cache_dir() == Path.cwd() / "mine"
    monkeypatch.delenv("ITM_FAST_CACHE_DIR")
    assert _native.cache_dir() == tmp_path / "itm_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _native.cache_dir() == Path.home() / ".cache" / "itm_fast"


def test_no_folder_at_all(csrc, cache, monkeypatch, tmp_path):
    cache.write_text("")
    monkeypatch.setattr(_native.tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert "no folder to compile the CPU kernels in" in _native.why_not()


def test_a_read_only_cache_serves_what_it_holds(csrc, cache, monkeypatch):
    assert works()
    fresh()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for module, name in ((os, "mkdir"), (_native.tempfile, "mkdtemp"), (os, "rename")):
        monkeypatch.setattr(module, name, refuse)
    assert works()


@pytest.mark.parametrize("message", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_under_the_compiler(csrc, compiler, cache, message):
    compiler(f'echo "fatal error: error writing to scale.o: {message}"; exit 1')
    assert "no space left for compiling" in _native.why_not()
    assert "set ITM_FAST_CACHE_DIR" in _native.why_not()
    assert not list(cache.iterdir())


def test_a_full_disk_under_python(csrc, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "build.json")

    monkeypatch.setattr(_native.json, "dumps", full)
    assert "No space left on device" in _native.why_not()
    assert not list(cache.iterdir())


def test_a_build_killed_half_way(csrc, compiler, cache, tmp_path):
    (tmp_path / "slow").touch()
    compiler(f'echo $$ > {tmp_path}/pid; [ -e {tmp_path}/slow ] && exec sleep 60; exec REAL "$@"')
    process = in_a_process(csrc)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.kill()
    process.communicate(timeout=60)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    (rest,) = cache.iterdir()
    assert rest.name.startswith("building-")

    (tmp_path / "slow").unlink()
    assert works()
    assert rest.is_dir()  # it might belong to a build that runs
    hours_ago = time.time() - 2 * 3600
    os.utime(rest, (hours_ago, hours_ago))
    (csrc / "cpu" / "twice.h").write_text("static double twice(double x) { return x + x; }")
    fresh()
    assert works()
    assert not rest.exists()


def test_two_processes_that_build_at_once(csrc, compiler, cache, tmp_path):
    # No compiler goes on before both processes have started theirs.
    begun = f"ls {tmp_path}/begun.* | wc -l"
    compiler(
        f"touch {tmp_path}/begun.$PPID\n"
        f"for i in $(seq 500); do [ $({begun}) -ge 2 ] && break; sleep 0.02; done\n"
        'exec REAL "$@"'
    )
    processes = [in_a_process(csrc) for _ in range(2)]
    said = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert len(list(tmp_path.glob("begun.*"))) == 2
    (home,) = cache.iterdir()
    assert {out.strip() for out, _ in said} == {str(home / "itm_fast.so")}
    assert all("compiling" in error for _, error in said)
    assert works()


def _truncated(home):
    whole = (home / "itm_fast.so").read_bytes()
    (home / "itm_fast.so").unlink()  # this process has it mapped: a new file, or it dies
    (home / "itm_fast.so").write_bytes(whole[: len(whole) // 2])


def _no_note(home):
    (home / "build.json").unlink()


def _strange_note(home):
    (home / "build.json").write_text("[1]")


def _no_library(home):
    (home / "itm_fast.so").unlink()
    (home / "itm_fast.so").write_text("not a library")
    note = json.loads((home / "build.json").read_text())
    (home / "build.json").write_text(json.dumps(note | {"sha256": _native._checksum(home)}))


@pytest.mark.parametrize("damage", [_truncated, _no_note, _strange_note, _no_library])
def test_a_damaged_build_is_made_again(csrc, cache, damage, capfd):
    assert works()
    (home,) = cache.iterdir()
    damage(home)
    fresh()
    assert works()
    assert capfd.readouterr().err.count("compiling") == 2
    assert list(cache.iterdir()) == [home]
    assert _native.outcome().path == home / "itm_fast.so"
    fresh()
    assert works()
    assert capfd.readouterr().err == ""


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
