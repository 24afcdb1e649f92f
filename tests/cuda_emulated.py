"""The kernels of csrc/cuda as a module that runs them on the CPU (cuda/emulator.h), built once.

`INSTANCES` lists what is built of each .cu file. A file becomes a .cpp file of its own, in a namespace of its name, so
that ninja compiles them side by side. EMULATOR_OPTIONS adds options of the compiler, as for the sanitizers:

    EMULATOR_OPTIONS="-g -fsanitize=address,undefined" ASAN_OPTIONS=detect_leaks=0 \\
        LD_PRELOAD=$(g++ -print-file-name=libasan.so) pytest tests/test_cuda_emulated.py
"""

import ctypes
import functools
import itertools
import os
import platform
import sys
from pathlib import Path

import pytest
import torch
from built_modules import build_module

from itm_fast import _cuda, _native
from itm_fast.ops._cuda import _pairs, similarity_score
from itm_fast.ops._cuda.cross_attention_score import Scan

HERE = Path(__file__).parent / "cuda"
NAME = "cuda_emulated_module"
OPTIONS = ["-DITM_EMULATE", "-ffp-contract=off", "-Wno-unknown-pragmas"]
OPTIONS += os.environ.get("EMULATOR_OPTIONS", "").split()
FLAGS = ("-O1", "-std=c++20", "-fPIC")
# The compiler calls a function before each access to memory; the other namespace keeps the two modules apart. No
# function sets errno, else what lies in memory would be read again after each exponential.
COUNTING = ("-O2", *FLAGS[1:], "-fno-math-errno", "-fsanitize=thread", "-Demulator=counting_emulator")
KINDS = ("F16", "BF16", "F16X3", "TF32X3")

SCANS = ["scan_t2i", "scan_i2t"]
GRAPHS = ["graph_scores", "graph_scores_in_clusters"]


def instances(kernels, kinds, tiles):
    """The C++ names of kernels with these template arguments, all with all."""
    return [f"{kernel}<{kind}, {tile}>" for kernel, kind, tile in itertools.product(kernels, kinds, tiles)]


NODE_TILES = (
    *(f"F16, 64, 128, {n}" for n in ("64, 16", "64, 48", "64, 128")),
    *("BF16, 64, 128, 64, 48", "F16, 128, 128, 64, 48", "F16, 64, 128, 64, 48, true"),
    *(f"F16X3, 64, 128, 64, {n}" for n in (16, 48)),
)
GROUP_FAULTS = (
    *("NOTHING", "NO_FENCE", "NO_COMMIT", "NO_WAIT", "NO_WAIT_EVER", "NO_COPY_FENCE", "NO_BARRIER", "REGISTERS"),
    *("OVERWRITTEN", "HALF", "ODD_PLACE", "OUTSIDE"),
)
CLUSTER_FAULTS = (
    *("NOTHING", "NO_FENCE", "NO_FIRST_BARRIER", "NO_LAST_BARRIER", "NO_ARRIVAL", "TWO_ARRIVALS", "FEW_BYTES"),
    *("MANY_BYTES", "NO_WAIT", "NO_OTHER_WAIT", "PARITY", "HASTY"),
)
# Products by groups of warps.
GROUPED_TILES = [f"{n}, 128, 64, 48, false, 128" for n in ("F16, 64", "BF16, 64", "BF16, 256")]
GROUPED_TILES += ["F16, 64, 128, 64, 48, true, 128"]
MANY_REGIONS = "BF16, 256, 128, 64, 112, false, 128"
PAIRS = "F16X3, 64, 128, 32, 48, true, 128"
WIDE_PAIRS = "F16X3, 256, 128, 32, 48, true, 64"
# The C++ names of kernel instances, by the stem of their file, here or in csrc/cuda.
INSTANCES = {
    "faults": [
        f"unsound<{fault}>"
        for fault in ("NOTHING", "NO_BARRIER", "NO_SECOND_BARRIER", "NO_WAIT", "NO_WAIT_EVER", "UNWRITTEN")
        + ("HALF_A_WARP", "HALF_A_BLOCK", "OUTSIDE", "ODD_ADDRESS")
    ]
    + [f"matrices<{pitch}>" for pitch in (16, 32, 80, 128)]
    + [f"grouped<GROUP_{fault}, false>" for fault in GROUP_FAULTS]
    + ["grouped<GROUP_NOTHING, true>"]
    + [f"clustered<CLUSTER_{fault}>" for fault in CLUSTER_FAULTS],
    # Columns of an image, slots of words, warps side by side, stages of a product.
    "scan": [
        *instances(SCANS, KINDS, ["12, 128, 2, 3", "36, 128, 2, 3"]),
        *instances(SCANS, [kind for kind in KINDS if kind != "BF16"], ["72, 128, 2, 3", "128, 128, 1, 3"]),
        *instances(SCANS, KINDS[2:], ["56, 128, 2, 3", "104, 128, 1, 3", "36, 128, 2, 2"]),
        *instances(SCANS, ["F16", "F16X3"], ["36, 128, 1, 2", "104, 64, 1, 2"]),
        *instances([f"{scan}_in_clusters" for scan in SCANS], KINDS[:3], ["36, 128, 3"]),
    ],
    "weights": [f"weights<{n}>" for n in ("F16, 12, 128, 2", "F16, 36, 128, 2", "BF16, 36, 128, 2", "F16, 128, 128, 1")]
    + ["weights<F16, 36, 128, 1>", "weights<BF16, 104, 128, 1>"]
    + [f"weights<F16X3, {n}>" for n in ("12, 128, 2", "36, 128, 2", "36, 128, 1")],
    # The kind, S, SLOTS, DEPTH and REGIONS.
    "global_nodes": [
        f"global_nodes<{n}>"
        for n in ("F16, 64, 128, 64", "BF16, 64, 128, 64", "F16, 128, 128, 64", "F16, 256, 128, 64")
        + ("BF16, 256, 128, 64", "BF16, 256, 64, 64", "F16, 256, 64, 32", "F16, 64, 128, 64, true")
        + ("F16X3, 64, 64, 64", "F16X3, 64, 64, 32")
        + ("F16X3, 256, 64, 64",)
    ],
    "graph": [
        f"graph_scores<{n}>"
        for n in (*NODE_TILES, "F16, 256, 128, 32, 48", "F16X3, 256, 64, 32, 48", "F16, 256, 32, 16, 48")
        + ("BF16, 256, 64, 16, 48", "F16X3, 64, 32, 32, 48", *GROUPED_TILES, MANY_REGIONS)
    ]
    + [f"{kernel}<{n}>" for kernel in GRAPHS for n in (PAIRS, WIDE_PAIRS)]
    + [f"graph_scores_in_clusters<{n}>" for n in GROUPED_TILES],
    "filter": [
        f"filter_scores<{n}>"
        for n in (*NODE_TILES, "F16, 256, 128, 64, 48", "F16X3, 256, 128, 32, 48", "F16, 256, 64, 16, 48")
        + ("BF16, 256, 128, 16, 48", "F16X3, 64, 64, 32, 48", *GROUPED_TILES, PAIRS, MANY_REGIONS)
    ]
    + [f"filter_scores_in_clusters<{n}>" for n in (*GROUPED_TILES, PAIRS)],
}
# Of those, what is built to count the threads' own loads and stores of shared memory; few, as they take long to build.
COUNTED = {
    "scan": [f"scan_{direction}_in_clusters<BF16, 36, 128, 3>" for direction in ("t2i", "i2t")],
    "weights": ["weights<BF16, 36, 128, 2>"],
    "global_nodes": ["global_nodes<BF16, 64, 128, 64>", "global_nodes<F16X3, 64, 64, 64>"],
    "graph": [f"graph_scores_in_clusters<{n}>" for n in ("BF16, 64, 128, 64, 48, false, 128", PAIRS)]
    + ["graph_scores<BF16, 64, 128, 64, 48>"],
    "filter": ["filter_scores_in_clusters<F16, 64, 128, 64, 48, true, 128>", "filter_scores<F16X3, 64, 128, 64, 48>"],
}
STRUCTURES = {
    "scan": [Scan],
    "weights": [_pairs.Weights],
    "global_nodes": [_pairs.GlobalNodes],
    "graph": [similarity_score.Graph],
    "filter": [similarity_score.Filter],
}  # twins of the structs of a file


def sources(instances, name):
    """File name -> text of what a module of these instances is built from."""
    cuda = _native.csrc_dir() / "cuda"
    files = [*cuda.glob("*.h"), *HERE.glob("*.h"), HERE / "emulated.cpp", HERE / "products.cpp"]
    found = {file.name: file.read_text().replace(NAME, name) for file in files}
    for stem, names in instances.items():
        file = next(place / f"{stem}.cu" for place in (cuda, HERE) if (place / f"{stem}.cu").is_file())
        lines = ['#include "gpu.h"', f"namespace {stem} {{", f'#line 1 "{file.name}"', file.read_text()]
        lines += [_cuda.layout_checks(twin, twin.__name__) for twin in STRUCTURES.get(stem, ())]
        lines += [
            f'static bool offered{i} = emulator::offer("{n}", {n}, {2 if "cluster" in n else 1});'
            for i, n in enumerate(names)
        ]
        found[f"{stem}.cpp"] = "\n".join([*lines, "}", ""])
    return found


@functools.cache
def load():
    """The module; or why there is none, a sentence."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "CUDA kernels are emulated on x86-64 Linux only"
    return build_module(NAME, _native.level(), sources(INSTANCES, NAME), OPTIONS, FLAGS)


@functools.cache
def load_counting():
    """A module of `COUNTED` whose counts have "own" too, an order of magnitude slower; or why there is none."""
    if platform.machine() != "x86_64" or sys.platform != "linux" or any("sanitize" in option for option in OPTIONS):
        return "accesses of CUDA kernels are counted on x86-64 Linux only, and without other sanitizers"
    name = "cuda_counting_module"
    return build_module(name, _native.level(), sources(COUNTED, name), OPTIONS, COUNTING)


@pytest.fixture(scope="module")
def emulated():
    """The module of the emulated kernels."""
    module = load()
    if isinstance(module, str):
        pytest.skip(module)
    return module


class Device:
    """A GPU that is not there: CPU tensors stand for its memory, and kernels run emulated.

    Attributes:
        capability: its compute capability.
        order: in which threads run; see emulator.h.
        launches: (the kernel, what its run counted) of each launch.
        counting: whether its kernels are those of `COUNTED`.
    """

    def __init__(self, module, counting=False):
        self.module, self.counting = module, counting
        self.capability, self.order, self.launches = (8, 0), 0, []

    def launch(self, kernel, problem, grid, device):
        """Run a kernel, unless this is a module of `COUNTED` without it."""
        if self.counting and kernel.name not in self.module.problem_bytes():
            return
        address = ctypes.addressof(problem)
        counts = self.module.run(kernel.name, address, *grid, kernel.threads, kernel.shared, self.order)
        self.launches.append((kernel, counts))


@pytest.fixture
def device(emulated, monkeypatch):
    """A `Device` that the backend launches on."""
    return installed(Device(emulated), monkeypatch)


@pytest.fixture
def counting_device(monkeypatch):
    """The same, where kernels of `COUNTED` alone run."""
    module = load_counting()
    if isinstance(module, str):
        pytest.skip(module)
    return installed(Device(module, counting=True), monkeypatch)


def installed(made, monkeypatch):
    monkeypatch.setattr(_cuda, "launch", made.launch)
    monkeypatch.setattr(_pairs, "COMPARED", _pairs.SIMILARITIES)
    monkeypatch.setattr(_cuda, "_variants", {})
    monkeypatch.setattr(_cuda, "_gave_up", {})
    monkeypatch.setattr(_cuda, "_without_clusters", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: made.capability)
    return made
