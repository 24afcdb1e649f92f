"""threads.h on its own: parts shared out to threads, what fails in them, and buffers."""

import ctypes
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from white_box import box

__all__ = ["box"]  # fixtures

NOWHERE = -1
OUT_OF_MEMORY = "out of memory in a CPU kernel; close other programs or score smaller blocks"


def test_buffers_are_zeros(box):
    assert [box.unclean(n) for n in (0, 1, 7, 1000, 40_000)] == [0] * 5


@pytest.mark.parametrize("parts,threads", [(0, 3), (1, 3), (40, 1), (40, 4), (3, 40)])
def test_every_part_is_done_once(box, parts, threads):
    assert box.spread(parts, threads, NOWHERE, 0) == ([1] * parts, None)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("bad", [0, 17, 39])
@pytest.mark.parametrize("kind,sentence", [(1, OUT_OF_MEMORY), (2, "a bad part")])
def test_what_fails_in_a_thread_is_passed_on(box, kind, sentence, bad, threads):
    seen, failed = box.spread(40, threads, bad, kind)
    assert failed == sentence
    assert max(seen) == 1
    assert threads > 1 or sum(seen) == bad + 1


def test_no_part_is_begun_after_a_failure(box):
    seen, failed = box.spread(10_000, 4, 0, 2)  # seconds of work
    assert failed == "a bad part"
    assert sum(seen) < 10_000


@pytest.mark.parametrize("bad", [0, 1])
def test_a_worker_that_cannot_be_made_is_passed_on(box, bad):
    assert box.spread(40, 4, bad, 3)[1] == "no worker"


def test_loops_take_the_threads_of_torchs_loops(box):
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        pytest.skip("torch has no OpenMP library with GNU's functions here")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).exp()
        there = {int(name) for name in os.listdir("/proc/self/task")}
        first = box.taking_part(2)
        assert len(first) == 2
        assert first <= there
        torch.ones(1 << 20).exp()
        assert box.taking_part(2) == first
    finally:
        torch.set_num_threads(before)


def test_a_forked_child_has_threads_of_its_own(box):
    assert len(box.taking_part(3)) == 3
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if len(box.taking_part(3)) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_that_cannot_start_leave_their_parts_to_the_others(box):
    """No memory is left for most of the stacks: all parts are done all the same, and the process lives."""
    child = os.fork()
    if not child:
        signal.alarm(20)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (100 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os._exit(0 if box.spread(256, 256, NOWHERE, 0) == ([1] * 256, None) else 1)
    assert os.waitpid(child, 0)[1] == 0
