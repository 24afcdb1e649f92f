"""Compile the Triton kernels for GPUs that are not here: `triton_compile.py [ARCH ...]` tells what is wrong with each.

With `--few`, as few ways as have between them every constant, type and tile size of every kernel.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ahead_of_time

import itm_fast

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one block may take


def compilers(processes: int) -> ProcessPoolExecutor:
    """Processes that compile: where Triton's interpreter is on, as in the tests, there is nothing to compile."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _no_interpreter)


def _no_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported: in functions here


def compile_row(row, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = row.kernel
    constants = {**row.constants, **{k: v for k, v in row.tile.items() if k in kernel.arg_names}}
    options = {k: v for k, v in row.tile.items() if k not in kernel.arg_names}
    names = [n for n in kernel.arg_names if n not in constants]
    types = row.types.split()
    assert len(names) == len(types), f"{kernel.__name__}: {len(types)} types for {names}"
    kinds = dict(zip(names, types))
    # As at run time, where _launch.aligned sees to it: a tensor starts at a multiple of 16 bytes, but for parts of one.
    anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    pointers = [n for n, t in kinds.items() if t.startswith("*") and n not in anywhere]
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in kernel.arg_names}, constants, attrs)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = resources(done.asm["cubin"])
    return {
        "kernel": kernel.__name__,
        "types": row.types,
        "constants": {k: str(v) for k, v in constants.items()},
        "options": options,
        "registers": registers,
        "spilled": stack,
        "shared": done.metadata.shared,
        "shared_limit": SHARED[arch],
        "wgmma": "wgmma.mma_async" in done.asm["ptx"],
        "products": row.products,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: what was spilled."""
    import triton

    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(beside) if beside.exists() else shutil.which("cuobjdump")
    assert tool, "no cuobjdump beside triton or on PATH"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found, said.stdout
    return int(found[1]), int(found[2])


def kernels() -> Path:
    """The folder of the kernels."""
    package = Path(itm_fast.__file__).resolve().parent
    checkout = package.parent / "kernels"
    return checkout if checkout.is_dir() else package / "kernels"


def files() -> list[str]:
    """The files that list the ways to compile their kernels."""
    return sorted(p.stem for p in kernels().glob("*.py") if "def compilations(" in p.read_text())


def covering(rows: list) -> list:
    """A few of the rows, among which every constant, type and tile size of every kernel occurs."""
    parts = []
    for row in rows:
        said = [*row.constants.items(), *row.tile.items(), *enumerate(row.types.split())]
        parts.append({(row.kernel.__name__, *one) for one in said})
    return [rows[at] for at in sorted(ahead_of_time.cover(parts))]


def compiled(file: str, arch: int, few: bool = False) -> list[dict]:
    """Compile a file's kernels; what came of each way. For a process of `compilers`."""
    found = []
    rows = list(importlib.import_module(f"itm_fast.kernels.{file}").compilations(arch))
    for row in covering(rows) if few else rows:
        try:
            found.append(compile_row(row, arch))
        except Exception as error:
            name = {"kernel": row.kernel.__name__, "constants": str(row.constants)}
            found.append(name | {"error": repr(error)[-2000:]})
    return found


def problems(row: dict, arch: int) -> Iterator[str]:
    """What keeps a compiled kernel from running well on an architecture, or at all."""
    name = f"{row['kernel']} {row['constants']}"
    if "error" in row:
        yield f"{name}: {row['error']}"
        return
    if row["registers"] <= 8:  # as Triton 3.6 makes for sm_100 where tensor memory is too small
        yield f"{name}: {row['registers']} registers: it does nothing"
    if row["spilled"]:
        yield f"{name}: {row['spilled']} bytes spilled at {row['registers']} registers"
    if row["shared"] > row["shared_limit"]:
        yield f"{name}: {row['shared']} bytes of shared memory, the limit is {row['shared_limit']}"
    if arch == 90 and row["products"] and not row["wgmma"]:
        yield f"{name}: its products are not wgmma"


def main() -> int:
    args = ahead_of_time.options(__doc__, SHARED)
    wrong = 0
    with compilers(len(os.sched_getaffinity(0))) as pool:
        jobs = [(file, arch, args.few) for file in files() for arch in args.arch]
        for (file, arch, _), done in [(job, pool.submit(compiled, *job)) for job in jobs]:
            said = [line for row in done.result() for line in problems(row, arch)]
            print(f"sm_{arch} {file}: {len(done.result())} ways, {len(said) or 'no'} problems", flush=True)
            print(*said, sep="\n", end="\n" * bool(said), flush=True)
            wrong += len(said)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
