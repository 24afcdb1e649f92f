"""The lock of one writer: held by an open file, refused by the name of its holder, gone with its process."""

import contextlib
import errno
import os
import platform
import signal
import subprocess
import sys

import pytest

from itm_fast._lock import Lock, LockedError


@contextlib.contextmanager
def holder(path, then):
    """A process that holds the lock and then does something."""
    code = f"import time; from itm_fast._lock import *; x = Lock({str(path)!r}, 'x'); print('held', flush=True); {then}"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        yield other


def test_a_second_writer_is_refused_by_name_of_the_first(tmp_path):
    lock = Lock(tmp_path / "lock", "the scores")
    with pytest.raises(LockedError, match=f"the scores: process {os.getpid()} on {platform.node()} .* since 2"):
        Lock(tmp_path / "lock", "the scores")
    lock.release()
    Lock(tmp_path / "lock", "the scores").release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [b"", b"{", b'{"process": 1', b'{"process": 1}', b"\0" * 40])
def test_a_note_without_a_holder_may_be_cut_anywhere(tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    Lock(tmp_path / "lock", "x").release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("content", [b"my notes", b"[]", b"\xff", b"{}"])
def test_a_file_that_is_no_lock_is_left_alone(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(FileExistsError, match="not a lock of itm-fast"):
        Lock(tmp_path / "lock", "x")
    assert (tmp_path / "lock").read_bytes() == content


def test_a_note_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with Lock(tmp_path / "lock", "x"), pytest.raises(LockedError, match="another process is writing there"):
        Lock(tmp_path / "lock", "x")


def test_a_forked_child_does_not_remove_the_lock_of_its_parent(tmp_path):
    lock = Lock(tmp_path / "lock", "x")
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    lock.check()
    with pytest.raises(LockedError):
        Lock(tmp_path / "lock", "x")
    lock.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user's place")
@pytest.mark.parametrize("mode,named", [(0o777, True), (0o1777, False)], ids=["may remove", "may not remove"])
def test_a_lock_that_another_user_left_can_be_taken(tmp_path, mode, named):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    (tmp_path / "lock").touch()
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o711)
    (folder / "lock").write_text('{"process": 1, "host": "gone", "since": "yesterday"}')
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            lock = Lock(folder / "lock", "x")
            try:
                Lock(folder / "lock", "x")
            except LockedError as error:
                taken = (f"process {os.getpid()} " in str(error)) == named
            lock.release()
            os._exit(0 if taken else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_killed_process_leaves_no_lock(tmp_path):
    with holder(tmp_path / "lock", "input()") as other:
        with pytest.raises(LockedError, match=f"process {other.pid} "):
            Lock(tmp_path / "lock", "x")
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock").exists()
    Lock(tmp_path / "lock", "x").release()


def test_waiting_ends_with_the_holder(tmp_path):
    with holder(tmp_path / "lock", "time.sleep(0.5)"):
        Lock(tmp_path / "lock", "x", wait=60).release()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_or_replaced_file_is_noticed(tmp_path, replaced):
    lock = Lock(tmp_path / "lock", "the scores")
    lock.check()
    (tmp_path / "lock").unlink()
    other = Lock(tmp_path / "lock", "the scores") if replaced else None
    with pytest.raises(LockedError, match="removed or replaced"):
        lock.check()
    lock.release()
    if other:
        other.check()
        other.release()


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match="not a lock of itm-fast"):
        Lock(tmp_path / "lock", "x")
    assert (tmp_path / "precious").read_text() == "kept"
