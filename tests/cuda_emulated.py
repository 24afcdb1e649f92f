"""The kernels of csrc/cuda as a module that runs them on the CPU (cuda/emulator.h), built once.

`INSTANCES` lists what is built of each .cu file. A file becomes a .cpp file of its own, in a namespace of its name, so
that ninja compiles them side by side.
"""

import functools
import platform
import sys
from pathlib import Path

import pytest
from built_modules import build_module

from itm_fast import _native

HERE = Path(__file__).parent / "cuda"
NAME = "cuda_emulated_module"
OPTIONS = ["-DITM_EMULATE", "-ffp-contract=off", "-Wno-unknown-pragmas"]
FLAGS = ("-O2", "-std=c++20", "-fPIC")
# The C++ names of kernel instances, by the stem of their file, here or in csrc/cuda.
INSTANCES = {
    "faults": [
        f"unsound<{fault}>"
        for fault in ("NOTHING", "NO_BARRIER", "NO_SECOND_BARRIER", "NO_WAIT", "NO_WAIT_EVER", "UNWRITTEN")
        + ("HALF_A_WARP", "HALF_A_BLOCK", "OUTSIDE", "ODD_ADDRESS")
    ],
}
LAYOUTS: dict[str, str] = {}  # C++ text that compares a file's structs with their twins in Python


def sources():
    """File name -> text of what the module is built from."""
    cuda = _native.csrc_dir() / "cuda"
    found = {file.name: file.read_text() for file in [*cuda.glob("*.h"), *HERE.glob("*.h"), HERE / "emulated.cpp"]}
    for stem, names in INSTANCES.items():
        file = next(place / f"{stem}.cu" for place in (cuda, HERE) if (place / f"{stem}.cu").is_file())
        lines = ['#include "gpu.h"', f"namespace {stem} {{", f'#line 1 "{file.name}"', file.read_text()]
        lines.append(LAYOUTS.get(stem, ""))
        lines += [f'static bool offered{i} = emulator::offer("{n}", {n});' for i, n in enumerate(names)]
        found[f"{stem}.cpp"] = "\n".join([*lines, "}", ""])
    return found


@functools.cache
def load():
    """The module; or why there is none, a sentence."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "CUDA kernels are emulated on x86-64 Linux only"
    return build_module(NAME, _native.level(), sources(), OPTIONS, FLAGS)


@pytest.fixture(scope="module")
def emulated():
    """The module of the emulated kernels."""
    module = load()
    if isinstance(module, str):
        pytest.skip(module)
    return module
