"""Where builds are kept: whatever happens to the folder or to a process that builds, there is a working library or a
sentence."""

import errno
import json
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
from native_cases import cache, compiler, csrc, fresh, in_a_process, until, works

from itm_fast import _native

__all__ = ["cache", "compiler", "csrc"]  # fixtures


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


def owned_by_another(monkeypatch, folders):
    """Let `folders(path)` belong to a user who is neither this one nor root."""
    real = Path.stat

    def stat(path, **options):
        found = real(path, **options)
        return os.stat_result((*found[:4], os.geteuid() + 7, *found[5:10])) if folders(path) else found

    monkeypatch.setattr(Path, "stat", stat)


def test_nothing_is_loaded_from_another_users_cache_folder(csrc, cache, monkeypatch):
    assert works()
    fresh()
    owned_by_another(monkeypatch, lambda path: path == cache)
    said = f"{cache} belongs to another user, number {os.geteuid() + 7}.*set ITM_FAST_CACHE_DIR to a folder of your own"
    with pytest.warns(UserWarning, match=said):
        assert works()
    assert _native.outcome().path is None


def test_nothing_is_loaded_that_another_user_put_in_a_shared_folder(csrc, cache, monkeypatch, capfd):
    assert works()
    fresh()
    theirs = next(cache.glob("generic-*"))
    owned_by_another(monkeypatch, lambda path: path == theirs)
    capfd.readouterr()
    assert works()
    assert "compiling its CPU kernels" in capfd.readouterr().err


def test_a_process_forked_during_a_build_does_not_wait_for_it(csrc):
    assert works()  # the child has it to load
    fresh()
    with _native._lock:
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if _native.why_not() is None else 1)
    assert os.waitpid(child, 0)[1] == 0


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


def test_a_sound_build_that_came_first_stays(csrc, cache, tmp_path):
    assert works()
    (home,) = cache.iterdir()
    second = Path(shutil.copytree(home, tmp_path / "result"))
    before = (home / "itm_fast.so").stat().st_ino
    assert _native._publish(second, home) == home / "itm_fast.so"
    assert (home / "itm_fast.so").stat().st_ino == before


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
