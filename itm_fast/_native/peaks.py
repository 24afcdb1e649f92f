"""Whether products of bfloat16 values pay: some processors multiply them at twice float32's rate, others at half.

Both rates are measured when they are first asked for, and kept beside the library under the processor's model: nodes of
a cluster may share the folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

DTYPES = ("float32", "float64", "bfloat16")  # by their numbers in csrc/cpu/peak.cpp
# They must be faster by this factor, which packing values in pairs costs and noise does not reach: processors known
# have 0.5 or 2.
FACTOR = 1.25
_ROUNDS, _STEPS = 30, 50_000  # rounds of half a millisecond: on a busy machine some are not interrupted
_MODEL = ("vendor_id", "cpu family", "model", "model name", "stepping")


class Peaks(NamedTuple):
    """Multiply-adds of one thread in flops per second, sums in float32."""

    float32: float
    bfloat16: float

    @property
    def bfloat16_pays(self) -> bool:
        """Whether products of bfloat16 values are faster than those of float32 values."""
        return self.bfloat16 > FACTOR * self.float32

    def __str__(self) -> str:
        bfloat16, float32 = (f"{rate / 1e9:.0f} GFLOP/s" for rate in (self.bfloat16, self.float32))
        return f"a core multiplies bfloat16 values at {bfloat16} and float32 values at {float32}"


def processor() -> dict[str, str]:
    """What names the model of the processor, `model name` among it."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    known = {name: fields[name] for name in _MODEL if name in fields}
    return {"model name": platform.processor() or platform.machine()} | known


def peak(library: ctypes.CDLL, dtype: str, steps: int, threads: int) -> float:
    """Flops per second of multiply-adds between registers (csrc/cpu/peak.cpp).

    Args:
        library: the native library.
        dtype: one of `DTYPES`; bfloat16 are dot products summed in float32.
        steps: of the loop that is timed; a million take some milliseconds.
        threads: that run it side by side.

    Raises:
        RuntimeError: the processor has no such instruction, or a thread does not start.
    """
    library.itm_peak.restype = ctypes.c_char_p
    seconds, flops = ctypes.c_double(), ctypes.c_double()
    numbers = (ctypes.c_int64(n) for n in (DTYPES.index(dtype), steps, threads))
    failure = library.itm_peak(*numbers, ctypes.byref(seconds), ctypes.byref(flops))
    if failure is not None:
        raise RuntimeError(failure.decode())
    return flops.value / seconds.value


@functools.cache
def measured(library: ctypes.CDLL, kept: Path | None) -> Peaks:
    """The peaks of this processor: those kept beside the library, else measured and kept there where that can be done.

    Args:
        library: a library compiled for bfloat16 products.
        kept: its file; None where it is not kept.
    """
    model = json.dumps(processor())
    path = kept and kept.with_name(f"peaks-{hashlib.sha256(model.encode()).hexdigest()[:16]}.json")
    if path:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(path.read_text())
            return Peaks(float(note["float32"]), float(note["bfloat16"]))
    # In turns: a busy moment lowers both. Nothing raises a rate, so the best round is the nearest to the truth.
    rounds = [[peak(library, dtype, _STEPS, 1) for dtype in Peaks._fields] for _ in range(_ROUNDS)]
    found = Peaks(*map(max, zip(*rounds)))
    if path:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                json.dump({"processor": processor(), **found._asdict()}, file)
            os.chmod(name, 0o644)  # as the library: other users may read it
            os.replace(name, path)
    return found
