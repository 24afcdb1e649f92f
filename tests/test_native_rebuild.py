"""A build compiles what changed and nothing else, and of two processes that need the same one compiles."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from native_cases import KNOWS_ITS_FLAGS, cache, compiled, compiler, csrc, finished, fresh, in_a_process, until, works

from itm_fast import _native

pytestmark = pytest.mark.slow  # compiles, or starts processes that do

__all__ = ["cache", "compiled", "compiler", "csrc"]  # fixtures
ALL = ["library", "other.cpp", "scale.cpp"]


@pytest.fixture
def two(csrc):
    """A second source, which includes nothing."""
    (csrc / "cpu" / "other.cpp").write_text('extern "C" int other() { return 1; }')
    return csrc


def build(csrc, level="generic"):
    """The library as a process of its own would see it: other() of the one loaded now."""
    return _native.build(csrc, level).library.other()


def change(path, text=None):
    path.write_text(text or path.read_text() + "\n// changed\n")


def test_a_changed_source_is_compiled_alone(two, compiled):
    assert build(two) == 1
    assert compiled() == ALL
    change(two / "cpu" / "other.cpp", 'extern "C" int other() { return 2; }')
    assert build(two) == 2
    assert compiled() == ["library", "other.cpp"]
    assert build(two) == 2
    assert compiled() == []


def test_a_changed_header_reaches_those_that_include_it(two, compiled):
    build(two)
    compiled()
    change(two / "cpu" / "twice.h")
    build(two)
    assert compiled() == ["library", "scale.cpp"]
    (two / "cpu" / "deep.h").write_text("")
    change(two / "cpu" / "twice.h", '#include "deep.h"\ninline double twice(double x) { return x + x; }')
    build(two)
    compiled()
    change(two / "cpu" / "deep.h")
    build(two)
    assert compiled() == ["library", "scale.cpp"]


def test_times_of_files_say_nothing(two, compiled, cache):
    build(two)
    shutil.rmtree(finished(cache))
    for file in two.rglob("*.*"):
        os.utime(file)
    compiled()
    build(two)
    assert compiled() == ["library"]
    # A source that changes and is older than its object, as from a wheel or a checkout of yesterday's.
    change(two / "cpu" / "other.cpp", 'extern "C" int other() { return 3; }')
    os.utime(two / "cpu" / "other.cpp", (1, 1))
    assert build(two) == 3


def test_a_clock_that_was_set_back(two, compiled, monkeypatch):
    build(two)
    real = Path.write_bytes

    def long_ago(path, content):
        real(path, content)
        os.utime(path, (1, 1))

    monkeypatch.setattr(Path, "write_bytes", long_ago)
    change(two / "cpu" / "other.cpp", 'extern "C" int other() { return 4; }')
    assert build(two) == 4


@pytest.mark.parametrize("seconds", [1, 2])
def test_a_file_system_that_keeps_whole_seconds(two, monkeypatch, seconds):
    build(two)
    write, utime = Path.write_bytes, os.utime

    def coarse(path, times=None, **options):
        if "ns" in options:
            options["ns"] = tuple(n - n % (seconds * 10**9) for n in options["ns"])
        utime(path, times, **options)

    def long_ago(path, content):
        write(path, content)
        utime(path, (1, 1))

    monkeypatch.setattr(os, "utime", coarse)
    monkeypatch.setattr(Path, "write_bytes", long_ago)
    change(two / "cpu" / "other.cpp", 'extern "C" int other() { return 6; }')
    assert build(two) == 6


def test_backward_passes_are_compiled_with_less_effort(csrc, compiler, tmp_path):
    (csrc / "cpu" / "scale_backward.cpp").write_text("")
    compiler(f'echo "$*" >> {tmp_path}/commands; exec REAL "$@"')
    _native.build(csrc, "generic")
    lines = [line for line in (tmp_path / "commands").read_text().splitlines() if "-c cpu/" in line]
    last = {line.split()[-3]: [flag for flag in line.split() if flag.startswith("-O")][-1] for line in lines}
    assert last == {"cpu/scale.cpp": "-O3", "cpu/scale_backward.cpp": "-O2"}


def test_sources_come_and_go(two, compiled):
    build(two)
    compiled()
    (two / "cpu" / "third.cpp").write_text('extern "C" int third() { return 7; }')
    assert _native.build(two, "generic").library.third() == 7
    assert compiled() == ["library", "third.cpp"]
    (two / "cpu" / "third.cpp").unlink()
    (two / "cpu" / "fourth.cpp").write_text("")
    assert not hasattr(_native.build(two, "generic").library, "third")
    assert compiled() == ["fourth.cpp", "library"]


def test_two_checkouts_take_turns(two, compiled, tmp_path):
    second = Path(shutil.copytree(two, tmp_path / "second"))
    change(second / "cpu" / "other.cpp", 'extern "C" int other() { return 5; }')
    assert build(two) == 1
    assert compiled() == ALL
    assert build(second) == 5
    assert compiled() == ["library", "other.cpp"]
    change(two / "cpu" / "scale.cpp")
    assert build(two) == 1
    assert compiled() == ALL


def test_levels_and_compilers_have_their_own_objects(two, compiled, compiler, tmp_path):
    build(two)
    compiled()
    if _native.build(two, "avx2").level == "avx2":
        assert compiled() == ALL
    script = (tmp_path / "fake-c++").read_text()
    compiler("exec false", version="g++ (of the tests) 10.0.0")
    (tmp_path / "fake-c++").write_text(script.replace("9.9.9", "10.0.0"))
    build(two)
    assert compiled() == ALL


def test_damaged_objects_are_not_used(two, compiled, cache):
    build(two)
    compiled()
    (damaged,) = cache.glob("objects-*/other.o")
    before = damaged.stat()
    damaged.write_bytes(b"")  # as a file whose blocks were never written when the power went
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))
    change(two / "cpu" / "scale.cpp")
    assert build(two) == 1
    assert compiled() == ALL


def test_what_compiled_beside_an_error_is_kept(two, compiled, tmp_path):
    script = (tmp_path / "fake-c++").read_text()
    logged = "grep -qs other.o .ninja_log && grep -qs scale.o .ninja_log"  # ninja keeps what it has logged
    waits = f'case "$*" in *"-c cpu/a.cpp"*) until {logged}; do sleep 0.1; done;; esac'
    (tmp_path / "fake-c++").write_text(script.replace("exec ", f"{waits}\nexec ", 1))
    change(two / "cpu" / "a.cpp", "int f() { return unheard_of; }")  # the last one to begin
    with pytest.raises(_native.Unavailable, match="unheard_of"):
        build(two)
    compiled()
    change(two / "cpu" / "a.cpp")
    with pytest.raises(_native.Unavailable, match="unheard_of"):
        build(two)
    assert compiled() == ["a.cpp"]
    (two / "cpu" / "a.cpp").unlink()
    assert build(two) == 1
    assert compiled() == ["library"]


def test_two_processes_at_once_compile_once(two, compiled, cache, tmp_path):
    processes = [in_a_process(two, tmp_path / "said") for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "said").read_text()
    assert compiled() == ALL
    assert finished(cache)
    assert not list(cache.glob("*.lock"))


def test_a_process_waits_for_the_one_that_compiles(csrc, compiler, tmp_path):
    (tmp_path / "slow").touch()
    compiler(f'{KNOWS_ITS_FLAGS}\nwhile [ -e {tmp_path}/slow ]; do sleep 0.02; done; exec REAL "$@"')
    said = tmp_path / "said"
    processes = [in_a_process(csrc, said) for _ in range(2)]
    until(lambda: said.exists() and said.read_text().count("\n") == 2)
    (tmp_path / "slow").unlink()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    waits, compiles = sorted(said.read_text().splitlines())
    assert waits.startswith("itm-fast: another process compiles the CPU kernels; waiting for it, up to 10 minutes (")
    assert any(f"process {process.pid} " in waits for process in processes)
    assert compiles.startswith("itm-fast: compiling its CPU kernels, ")


def test_a_process_that_waited_long_enough_compiles_too(csrc, compiled, cache, monkeypatch):
    monkeypatch.setattr(_native.cache, "WAIT", 0.1)
    assert works()
    (objects,) = cache.glob("objects-*")
    change(csrc / "cpu" / "scale.cpp")
    fresh()
    with _native.cache.turn(objects):
        assert works()


def test_a_killed_build_holds_up_nobody(csrc, compiler, cache, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(_native.cache, "WAIT", 0.1)
    (tmp_path / "slow").touch()
    compiler(f'{KNOWS_ITS_FLAGS}\necho $$ > {tmp_path}/pid; [ -e {tmp_path}/slow ] && exec sleep 600; exec REAL "$@"')
    process = in_a_process(csrc, tmp_path / "said")
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.kill()
    process.join(60)
    orphan = int((tmp_path / "pid").read_text())
    (tmp_path / "slow").unlink()
    capfd.readouterr()
    assert works()
    assert "another process" not in capfd.readouterr().err
    assert len(list(cache.glob("building-*"))) == 1  # it might belong to a build that runs
    os.kill(orphan, signal.SIGKILL)


def test_ninja_is_found_in_its_package_or_on_the_path(csrc, monkeypatch, tmp_path):
    found = _native.compiling.find_ninja()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _native.compiling.find_ninja() == found
    monkeypatch.setattr(_native.compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_native.Unavailable, match=r"no ninja .*`pip install ninja`"):
        _native.compiling.find_ninja()
    (tmp_path / "ninja").symlink_to(found)
    assert _native.compiling.find_ninja() == str(tmp_path / "ninja")
