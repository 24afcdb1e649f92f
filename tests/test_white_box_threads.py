"""threads.h on its own: parts shared out to threads, what fails in them, and buffers."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import needs_cpu
from white_box import box, load, native_level

__all__ = ["box"]  # fixtures

NOWHERE = -1
OUT_OF_MEMORY = "out of memory in a CPU kernel; close other programs or score smaller blocks"


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_buffers_are_zeros(box, threads):
    assert [box.unclean(n, threads) for n in (0, 1, 7, 1000, 40_000, 300_000)] == [0] * 6


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
        box.taking_part(2)  # this thread's first loop of two
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
    assert len(box.taking_part(3)) == len(box.taking_part(3)) == 3  # OpenMP has them since the second loop
    child = os.fork()
    if not child:
        signal.alarm(300)
        os._exit(0 if len(box.taking_part(3)) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0


FORKED_BEFORE_LOADING = """
import multiprocessing, os, signal, torch
torch.set_num_threads(2)
torch.ones(1 << 20).exp()

def child():
    signal.alarm(300)
    from itm_fast.ops import cross_attention_score
    many = torch.arange(0, 641, 10, dtype=torch.int32)
    cross_attention_score(torch.randn(64, 36, 64), torch.randn(640, 64), many, backend="cpu")

early = multiprocessing.get_context("fork").Process(target=child)
early.start()
early.join()
import itm_fast
late = os.fork()
if not late:
    child()
    os._exit(0)
assert (early.exitcode, os.waitpid(late, 0)[1]) == (0, 0)
"""


@needs_cpu
def test_a_child_forked_before_the_library_was_loaded_has_threads_of_its_own():
    subprocess.run([sys.executable, "-c", FORKED_BEFORE_LOADING], check=True)


LIMITED = f"""
import resource
from pathlib import Path
from white_box import load, native_level
box = load(native_level())
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)
assert [box.spread(256, 256, {NOWHERE}, 0) for _ in range(2)] == [([1] * 256, None)] * 2
"""


def test_openmp_is_not_asked_for_threads_that_cannot_start():
    """It would end the process. Without a fork, after which OpenMP is not used."""
    if isinstance(reason := load(native_level()), str):
        pytest.skip(reason)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", LIMITED], check=True, env={**os.environ, "PYTHONPATH": path})


def test_threads_that_cannot_start_leave_their_parts_to_the_others(box):
    """No memory is left for most of the stacks: all parts are done all the same, and the process lives."""
    child = os.fork()
    if not child:
        signal.alarm(300)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (100 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os._exit(0 if box.spread(256, 256, NOWHERE, 0) == ([1] * 256, None) else 1)
    assert os.waitpid(child, 0)[1] == 0
