"""Compile the kernels of one file ahead of time: `triton_compile.py FILE ARCH` prints one JSON line for each way.

A process of its own, for where Triton's interpreter is on there is nothing to compile.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one block may take


def compile_row(row, arch: int) -> dict:
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


if __name__ == "__main__":
    for row in importlib.import_module(f"itm_fast.kernels.{sys.argv[1]}").compilations(int(sys.argv[2])):
        try:
            told = compile_row(row, int(sys.argv[2]))
        except Exception as error:
            told = {"kernel": row.kernel.__name__, "constants": str(row.constants), "error": repr(error)[-2000:]}
        print(json.dumps(told), flush=True)
