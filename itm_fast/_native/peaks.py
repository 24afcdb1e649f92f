"""Whether bfloat16 products are faster than float32 ones: processors have twice the rate, or half.

Both rates are measured on first use and saved beside the library, in one file for each processor model, as nodes of a
cluster may share the folder.
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

DTYPES = ("float32", "float64", "bfloat16")  # a dtype's index is its number in csrc/cpu/peak.cpp
# bfloat16 products must have this many times float32's rate to be used: packing values in pairs costs about as much.
# It is far from noise, as known processors have 0.5 or 2.
FACTOR = 1.25
_ROUNDS, _STEPS = 30, 50_000  # measurements, and loop steps in each (0.5 ms): on a busy machine some run undisturbed
_MODEL = ("vendor_id", "cpu family", "model", "model name", "stepping")  # fields of /proc/cpuinfo


class Peaks(NamedTuple):
    """Rates of one thread's multiply-adds, summed in float32, in flops per second."""

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
    """The processor's model: those of `_MODEL`'s fields that are known, always with "model name"."""
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
        dtype: one of `DTYPES`; bfloat16 means dot products summed in float32.
        steps: steps of the timed loop; a million take some milliseconds.
        threads: number of threads that run the loop at the same time.

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
    """The rates of this processor: read from the file beside the library, or measured and, if possible, saved there.

    Args:
        library: a library compiled with bfloat16 products.
        kept: the library's file; None if it is not kept.
    """
    model = json.dumps(processor())
    path = kept and kept.with_name(f"peaks-{hashlib.sha256(model.encode()).hexdigest()[:16]}.json")
    if path:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(path.read_text())
            return Peaks(float(note["float32"]), float(note["bfloat16"]))
    # Alternate dtypes, so that a busy moment affects both. Noise only lowers a rate: the highest is the best estimate.
    rounds = [[peak(library, dtype, _STEPS, 1) for dtype in Peaks._fields] for _ in range(_ROUNDS)]
    found = Peaks(*map(max, zip(*rounds)))
    if path:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                json.dump({"processor": processor(), **found._asdict()}, file)
            os.chmod(name, 0o644)  # other users may read it, as they may read the library
            os.replace(name, path)
    return found
