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
from native_cases import KNOWS_ITS_FLAGS, cache, compiled, compiler, csrc, finished, fresh, works

from itm_fast import _native

pytestmark = pytest.mark.slow  # compiles, or starts processes that do

__all__ = ["cache", "compiled", "compiler", "csrc"]  # fixtures


def test_a_cache_folder_that_cannot_be_written(csrc, cache, tmp_path, monkeypatch):
    cache.write_text("a file where the folder should be")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(_native.cache.tempfile, "tempdir", str(tmp_path / "temporary"))
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


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_nothing_is_loaded_from_a_folder_that_others_may_write_to(csrc, cache, mode):
    assert works()
    fresh()
    cache.chmod(mode)
    with pytest.warns(UserWarning, match=f"other users may write to {cache}.*`chmod go-w {cache}`"):
        assert works()
    assert _native.outcome().path is None
    cache.chmod(0o755)
    fresh()
    assert works()
    assert _native.outcome().path is not None


def test_a_folder_where_others_may_only_add_serves(csrc, cache):
    cache.mkdir()
    cache.chmod(0o1777)
    assert works()
    assert _native.outcome().path is not None


def assert_made_again(kind, csrc, compiled):
    """The next process uses nothing of a build, or of its objects, that others may have written."""
    if kind == "objects":
        (csrc / "cpu" / "more.cpp").write_text("")
    fresh()
    compiled()
    assert works()
    assert compiled() == {"generic": ["library"], "objects": ["library", "more.cpp", "scale.cpp"]}[kind]


@pytest.mark.parametrize("kind", ["generic", "objects"])
def test_what_others_may_have_changed_is_made_again(csrc, cache, compiled, kind):
    assert works()
    (folder,) = cache.glob(f"{kind}-*")
    folder.chmod(0o777)
    assert_made_again(kind, csrc, compiled)
    assert {path.stat().st_mode & 0o777 for path in cache.glob("generic-*")} == {0o755}  # other users may run it
    assert {path.stat().st_mode & 0o777 for path in cache.glob("objects-*")} == {0o700}


@pytest.mark.parametrize("kind", ["generic", "objects"])
@pytest.mark.parametrize("change", ["link", "sticky", "file", "inner link"])
def test_what_others_may_have_put_in_a_shared_folder_is_made_again(csrc, cache, compiled, tmp_path, kind, change):
    cache.mkdir()
    cache.chmod(0o1777)
    assert works()
    (folder,) = cache.glob(f"{kind}-*")
    file = folder / {"generic": "itm_fast.so", "objects": "scale.o"}[kind]
    if change == "link":  # to a folder that others may add to, like /tmp
        folder.rename(tmp_path / "theirs")
        folder.symlink_to(tmp_path / "theirs")
        (tmp_path / "theirs").chmod(0o1777)
    elif change == "sticky":
        folder.chmod(0o1777)
    elif change == "file":
        file.chmod(0o666)
    else:
        file.rename(tmp_path / "theirs")
        file.symlink_to(tmp_path / "theirs")
    assert_made_again(kind, csrc, compiled)
    fresh()
    assert works()
    assert compiled() == []
    assert not any(path.is_symlink() for path in cache.rglob("*"))


@pytest.mark.parametrize("umask", [0, 0o002])
def test_all_that_is_kept_is_the_users_own(csrc, cache, compiled, umask):
    before = os.umask(umask)
    try:
        assert works()
        (csrc / "cpu" / "more.cpp").write_text("")
        fresh()
        compiled()
        assert works()
    finally:
        os.umask(before)
    assert compiled() == ["library", "more.cpp"]
    assert not any(path.stat().st_mode & 0o022 for path in (cache, *cache.rglob("*")))
    assert {path.stat().st_mode & 0o777 for path in (cache, *cache.glob("objects-*"))} == {0o700}
    assert {path.stat().st_mode & 0o755 for path in cache.glob("generic-*")} == {0o755}


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
    monkeypatch.setattr(_native.cache.Path, "home", homeless)
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
    monkeypatch.setattr(_native.cache.tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert "no folder to compile the CPU kernels in" in _native.why_not()


def test_a_read_only_cache_serves_what_it_holds(csrc, cache, monkeypatch):
    assert works()
    fresh()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for module, name in ((os, "mkdir"), (_native.cache.tempfile, "mkdtemp"), (os, "rename")):
        monkeypatch.setattr(module, name, refuse)
    assert works()


@pytest.mark.parametrize("stage", ["", KNOWS_ITS_FLAGS])
@pytest.mark.parametrize("message", ["No space left on device", "Disk quota exceeded"])
def test_a_full_disk_under_the_compiler(csrc, compiler, cache, message, stage):
    compiler(f'{stage}\necho "fatal error: error writing to scale.o: {message}"; exit 1')
    assert f"no space left for compiling the CPU kernels in {cache};" in _native.why_not()
    assert "set ITM_FAST_CACHE_DIR" in _native.why_not()
    assert not list(cache.glob("*.log"))


def test_a_full_disk_under_python(csrc, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "build.json")

    monkeypatch.setattr(_native.cache.json, "dumps", full)
    assert "no space left for compiling" in _native.why_not()
    assert not list(cache.glob("generic-*"))


def test_what_killed_builds_left_goes_after_an_hour(csrc, cache):
    for name in ("building-now", "building-before", "generic-of-somebody"):
        (cache / name).mkdir(parents=True)
    hours_ago = time.time() - 2 * 3600
    os.utime(cache / "building-before", (hours_ago, hours_ago))
    assert works()
    assert {path.name for path in cache.glob("*-[a-z]*")} >= {"building-now", "generic-of-somebody"}
    assert not (cache / "building-before").exists()


def test_builds_and_objects_that_nobody_uses_go_after_a_month(csrc, cache):
    assert works()
    used, (objects,) = finished(cache), cache.glob("objects-*")
    unused, foreign = cache / used.name.replace("generic", "avx2"), cache / "generic-of-somebody"
    month_ago = time.time() - 31 * 86400
    for folder in (unused, foreign, objects, used):
        folder.mkdir(exist_ok=True)
        os.utime(folder, (month_ago, month_ago))
    fresh()
    assert works()  # by which it is used
    (csrc / "cpu" / "twice.h").write_text("static double twice(double x) { return x + x; }")
    fresh()
    assert works()
    assert used.exists()
    assert foreign.exists()
    assert not unused.exists()
    assert objects.stat().st_mtime > month_ago + 1


def test_a_sound_build_that_came_first_stays(csrc, cache, tmp_path):
    assert works()
    home = finished(cache)
    second = Path(shutil.copytree(home, tmp_path / "result"))
    before = (home / "itm_fast.so").stat().st_ino
    assert _native.cache.publish(second, home, _native.cache.load) == home
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
    (home / "build.json").write_text(json.dumps(note | {"sha256": _native.cache.checksum([home / "itm_fast.so"])}))


@pytest.mark.parametrize("damage", [_truncated, _no_note, _strange_note, _no_library])
def test_a_damaged_build_is_made_again(csrc, cache, damage, capfd):
    assert works()
    home = finished(cache)
    damage(home)
    fresh()
    assert works()
    assert capfd.readouterr().err.count("compiling") == 2
    assert finished(cache) == home
    assert not list(cache.glob("building-*"))
    assert _native.outcome().path == home / "itm_fast.so"
    fresh()
    assert works()
    assert capfd.readouterr().err == ""
