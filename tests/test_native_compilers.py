"""A compiler that is not there, too old, killed, out of memory, mute or without space ends in a sentence that says what
to do."""

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from native_cases import KNOWS_ITS_FLAGS, REAL, cache, compiler, csrc, fresh, until, works

from itm_fast import _native

pytestmark = pytest.mark.slow  # compiles, or starts processes that do

__all__ = ["cache", "compiler", "csrc"]  # fixtures


def test_no_compiler(csrc, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _native.why_not() == (
        "no C++ compiler on PATH; install g++ or clang++, or set CXX, or install the wheel that "
        "`pip wheel --no-deps .` makes on a machine with a compiler: it holds the kernels"
    )
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler on PATH"):
        _native.call("itm_scale", None)


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


OLD_ASSEMBLER = 'case "$*" in *-fsyntax-only*);; *-mamx-bf16*) echo "Error: no such instruction"; exit 1;; esac'


@pytest.mark.parametrize("old", [OLD_ASSEMBLER, 'set -- "$@" -U__AMX_BF16__ -D__AMXBF16__'])
def test_a_compiler_that_knows_amx_in_name_alone(csrc, compiler, old):
    compiler(old + '\nexec REAL "$@"')
    assert _native.build(csrc, "amx_bf16").level == "avx512_bf16"


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
    (tmp_path / "child").touch()
    compiler(f"{KNOWS_ITS_FLAGS}\nsleep 600 & echo $! > {tmp_path}/child; wait")

    def clock():  # the time is over as soon as the child runs
        return time.monotonic() + (10 * _native.compiling.SECONDS if (tmp_path / "child").read_text() else 0)

    monkeypatch.setattr(_native.compiling, "time", SimpleNamespace(monotonic=clock))
    assert "did not finish in time and was stopped" in _native.why_not()
    child = int((tmp_path / "child").read_text())
    until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split())
    assert [path.name.split("-")[0] for path in cache.iterdir()] == ["objects"]


def test_one_failure_stops_the_other_compilers(csrc, compiler, tmp_path, monkeypatch):
    (csrc / "cpu" / "slow.cpp").write_text("")
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    compiler(
        f'{KNOWS_ITS_FLAGS}\ncase "$*" in *slow*) touch {begun}; sleep 120; touch {ended};; '
        f"*) until [ -e {begun} ]; do sleep 0.02; done; echo error: no; exit 1;; esac"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)  # both at once
    assert "error: no" in _native.why_not()
    assert not ended.exists()


COMPILING = 'case "$*" in *"-c cpu/"*) {};; *) exec REAL "$@";; esac'
LINKING = 'case "$*" in *-shared*) {};; *) exec REAL "$@";; esac'
NO_MEMORY = "the compiler was killed or got no memory.* close other programs, or compile one file at a time"


@pytest.mark.parametrize(
    "stage", [KNOWS_ITS_FLAGS + "\n{}", COMPILING, LINKING, "{}"], ids=["all", "compiling", "linking", "probing"]
)
@pytest.mark.parametrize(
    "end",
    [
        "kill -9 $$",
        "echo 'g++: fatal error: Killed signal terminated program cc1plus'; exit 1",
        'echo "clang++: error: unable to execute command: Killed"; exit 254',
        "echo 'cc1plus: out of memory allocating 65536 bytes after a total of 1 bytes'; exit 1",
        "echo 'virtual memory exhausted: Cannot allocate memory'; exit 1",
        "echo \"terminate called after throwing an instance of 'std::bad_alloc'\"; exit 1",
        "echo 'LLVM ERROR: out of memory'; exit 1",
    ],
)
def test_a_compiler_without_memory(csrc, compiler, stage, end):
    compiler(stage.replace("{}", end))
    reason = _native.why_not()
    assert re.search(NO_MEMORY, reason)
    assert "GCC 11" not in reason
    assert "space" not in reason


def test_a_line_of_the_sources_about_memory_is_no_lack_of_it(csrc):
    (csrc / "cpu" / "wrong.cpp").write_text(
        "#include <new>\n"
        'const char* f() { try {} catch (const std::bad_alloc&) { return unheard_of, "out of memory"; } }'
    )
    assert re.search("do not compile with .*: .*unheard_of", _native.why_not())


@pytest.mark.parametrize("stage", ["{}", COMPILING])
def test_a_compiler_that_crashes(csrc, compiler, stage):
    compiler(stage.replace("{}", "kill -SEGV $$"))
    reason = _native.why_not()
    assert "the compiler was stopped by SIGSEGV; try again, or set CXX to another compiler" in reason
    assert "fake-c++ (g++ (of the tests) 9.9.9) cannot compile the CPU kernels" in reason


@pytest.mark.parametrize("stage,file", [("exit 0", "scale.o"), (COMPILING, "scale.o"), (LINKING, "itm_fast.so")])
def test_a_compiler_that_writes_nothing(csrc, compiler, cache, stage, file):
    compiler(stage.replace("{}", "exit 0"))
    reason = _native.why_not()
    assert re.search(rf"9\.9\.9\) ends without an error and does not write {file}; set CXX to g\+\+", reason)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("stage", ["{}", COMPILING, LINKING])
def test_a_compiler_that_fails_without_a_word(csrc, compiler, stage):
    compiler(stage.replace("{}", "exit 3"))
    assert "it ends with status 3 and says nothing" in _native.why_not()


@pytest.mark.parametrize("said", ["", "echo sorry"])
def test_a_compiler_whose_version_cannot_be_asked(csrc, compiler, said):
    compiler("").write_text(f"#!/bin/sh\n{said}\nkill -9 $$\n")
    assert re.search(f"fake-c\\+\\+ --version fails: {NO_MEMORY}", _native.why_not())
    compiler("").write_text("#!/bin/sh\nexit 4\n")
    fresh()
    assert "fake-c++ --version fails: it ends with status 4 and says nothing; set CXX" in _native.why_not()


def test_a_linker_that_fails_and_leaves_a_library(csrc, compiler, cache):
    compiler(LINKING.replace("{}", 'REAL "$@"; exit 1'))
    assert re.search(r"do not compile with .*9\.9\.9: it ends with status 1 and says nothing", _native.why_not())
    assert not list(cache.glob("generic-*"))


def test_ninja_that_is_too_old(csrc, monkeypatch):
    rules = _native.compiling._RULES
    assert "ninja_required_version = 1.11\n" in rules  # older ones compile again what changed while they ran
    monkeypatch.setattr(_native.compiling, "_RULES", rules.replace("= 1.11\n", "= 99.0\n"))
    assert re.search(r"ninja version \(.*\) incompatible with .* version \(99\.0\)", _native.why_not())


def test_ninja_that_fails(csrc, tmp_path, monkeypatch):
    (tmp_path / "ninja").write_text("#!/bin/sh\necho ninja: fatal: what now\nexit 1\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setattr(_native.compiling, "find_ninja", lambda: str(tmp_path / "ninja"))
    assert "ninja: fatal: what now" in _native.why_not()


def test_a_compiler_named_from_this_folder(csrc, compiler, tmp_path, monkeypatch):
    compiler('exec REAL "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./fake-c++")
    assert works()
