"""The lock of one writer: held by an open file, refused by the name of its holder, gone with its process."""

import contextlib
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


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b"\xff", b'{"process": 1}'])
def test_what_lies_in_a_file_without_a_holder_does_not_matter(tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    Lock(tmp_path / "lock", "x").release()


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
    with pytest.raises(OSError):
        Lock(tmp_path / "lock", "x")
    assert (tmp_path / "precious").read_text() == "kept"
