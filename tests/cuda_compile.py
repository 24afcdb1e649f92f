"""Compile the CUDA kernels for GPUs that are not here: `cuda_compile.py [ARCH ...]` prints a line for each.

With `--few`, as few as have every template argument of every kernel between them. The module of an op in
`itm_fast.ops._cuda` lists with `compilations(capability)` the kernels that the op may launch on a GPU of a compute
capability. What the cache folder has of them is only read.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import ahead_of_time

from itm_fast import ops
from itm_fast._cuda import Kernel, cubins, nvrtc

# The most bytes of shared memory that a block may take, by architecture.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 65536  # that the threads of a block share
# Bytes that a thread may spill, whose sums alone take half of the 255 registers.
SPILLS = {("filter_scores<F16X3, 256, 128, 32, 48>", 100): 36}


def modules() -> list[ModuleType]:
    """The modules of ops."""
    package = f"{ops.__name__}._cuda"
    names = (m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__) if m.name[0] != "_")
    return [importlib.import_module(f"{package}.{name}") for name in names]


def kernels(module: ModuleType, architecture: int) -> list[Kernel]:
    """The kernels of a module that may run on GPUs of an architecture."""
    return list(dict.fromkeys(module.compilations(divmod(architecture, 10))))


def covering(kernels: list[Kernel]) -> list[Kernel]:
    """A few of the kernels, among which every template argument of every kernel occurs."""
    parts = []
    for kernel in kernels:
        name, _, arguments = kernel.name.partition("<")
        parts.append({(name, place, argument) for place, argument in enumerate(arguments.split(","))})
    return [kernels[at] for at in ahead_of_time.cover(parts)]


def problems(kernel: Kernel, architecture: int) -> Iterator[str]:
    """Compile a kernel; tell what keeps it from running well on the architecture, or at all."""
    try:
        built = cubins.build(kernel, architecture)
    except RuntimeError as error:
        yield str(error)
        return
    shared, limit = built.shared + kernel.shared, SHARED[architecture]
    if not built.registers:
        yield "the log does not tell its registers"
    if built.serialized:
        yield "products of groups of warps wait for each other"
    if built.spilled > SPILLS.get((kernel.name, architecture), 0):
        yield f"{built.spilled} bytes spilled at {built.registers} registers"
    if -(-built.registers // 8) * 8 * kernel.threads > REGISTERS:
        yield f"{kernel.threads} threads of {built.registers} registers are more than a block may have"
    if shared > limit:
        yield f"{shared} bytes of shared memory, the limit is {limit}"


def main() -> int:
    args = ahead_of_time.options(__doc__, SHARED)
    choose = covering if args.few else list
    found = [(a, kernels(module, a)) for a in args.arch for module in modules()]
    jobs = [(kernel, a) for a, of_module in found for kernel in choose(of_module)]
    start, bad = time.perf_counter(), 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (kernel, architecture), wrong in zip(jobs, pool.map(lambda job: list(problems(*job)), jobs)):
            built = None if wrong else cubins.build(kernel, architecture)
            said = f"{built.registers} registers, {built.shared + kernel.shared} bytes shared" if built else wrong
            print(f"sm_{architecture} {kernel.name}: {said}", flush=True)
            bad += bool(wrong)
    took = time.perf_counter() - start
    print(f"NVRTC {nvrtc.library().version}: {len(jobs)} kernels, {bad or 'no'} problems, {took:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
