"""What the tests of the `cpu` backend share: instruction sets below the processor's own, and measured scratch."""

import subprocess
import sys
from pathlib import Path

import pytest

import itm_fast
from itm_fast import _native
from itm_fast._native import compiling

needs_cpu = pytest.mark.skipif(itm_fast.why_not("cpu") is not None, reason=str(itm_fast.why_not("cpu")))


over_lesser_processors = pytest.mark.parametrize(
    "level", [pytest.param(level, marks=pytest.mark.slow) for level in ("avx2", "generic")]
)


def at_level(level, monkeypatch):
    """Run the kernels of a lesser processor until the test ends: those of avx2 as users compile them, and those of
    generic, which few have, with -O1 in half the time. Each is compiled once for all tests."""
    if level == "generic":
        monkeypatch.setattr(compiling, "FLAGS", ("-O1", *compiling.FLAGS[1:]))
        monkeypatch.setattr(compiling, "O2_FLAGS", ())
    monkeypatch.setattr(_native, "_outcome", _native.build(_native.csrc_dir(), level))
    monkeypatch.setattr(_native, "_functions", {})


MEASURE = """
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = status("VmRSS")
results = call()
peak = status("VmHWM")
results = [results] if isinstance(results, torch.Tensor) else results
print(peak - before - sum(r.nbytes for r in results))
"""


def scratch_of(setup, call):
    """Bytes that a call takes at its peak beyond its inputs and its results, in a process of its own.

    Args:
        setup: statements that make what the call takes.
        call: an expression, tensors its value.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process cannot be reset here")
    lines = ["import torch, itm_fast", "itm_fast._native.why_not()", *setup, f"call = lambda: {call}", MEASURE]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
