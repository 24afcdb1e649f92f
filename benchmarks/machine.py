"""The machine that runs the benchmarks: its description, its peak rates, and the memory that a call takes."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import itm_fast
from benchmarks.harness import progress, seconds
from itm_fast import _native

PEAKS = ("matmul_float32", "fma_float32", "fma_bfloat16")


def environment() -> dict:
    """Versions, device, threads and commit, for the result file."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {
        "itm_fast": itm_fast.__version__,
        "commit": commit or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def head(shape: str, rounds: int, peak: dict[str, float | None]) -> dict:
    """The first fields of every result file."""
    giga = {name: rate and rate / 1e9 for name, rate in peak.items()}
    matmul = giga.pop("matmul_float32")
    fma = {name.removeprefix("fma_"): rate for name, rate in giga.items()}
    return {
        "environment": environment(),
        "shape": shape,
        "rounds": rounds,
        "matmul_peak_gflops": matmul,
        "fma_peak_gflops": fma,
    }


def _cpu() -> str:
    """Model, cores and vectors; a name such as "AMD EPYC" stands for several generations, which the family tells."""
    known = _native.peaks.processor()
    numbers = [f"{field.removeprefix('cpu ')} {known[field]}" for field in ("cpu family", "model") if field in known]
    name = f"{known['model name']} ({', '.join(numbers)})" if numbers else known["model name"]
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def matmul_peak(device: str = "cpu") -> float:
    """Multiply-adds per second x 2 of a large float32 matrix product, the rate that products in PyTorch can reach."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5))


def fma_peak(dtype: str = "float32") -> float:
    """Flops per second of fused multiply-adds between registers (csrc/cpu/peak.cpp), on torch's threads.

    Args:
        dtype: float32, float64, or bfloat16 (dot products summed in float32).

    Raises:
        RuntimeError: the native library cannot be built, or the processor has no such instruction.
    """
    built = _native.outcome()
    if isinstance(built, str):
        raise RuntimeError(built)
    threads = torch.get_num_threads()
    return max(_native.peaks.peak(built.library, dtype, 5_000_000, threads) for _ in range(10))


def peaks(device: str) -> dict[str, float | None]:
    """What the machine reaches, in flops per second by the names of `PEAKS`; None where it has no such thing."""
    found: dict[str, float | None] = {"matmul_float32": matmul_peak(device)}
    for name in PEAKS[1:]:
        try:
            found[name] = fma_peak(name[4:]) if device == "cpu" else None
        except RuntimeError as error:
            progress(f"{name} not measured: {error}")
            found[name] = None
    return found


def higher(a: dict[str, float | None], b: dict[str, float | None]) -> dict[str, float | None]:
    """The higher of two measurements of `peaks`: a busy machine lowers a measurement, and nothing raises it."""
    return {name: a[name] and b[name] and max(a[name], b[name]) for name in PEAKS}


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """`function(*args)` in a process of its own with as many threads: nothing that another call left is shared.

    Raises:
        RuntimeError: the process died; whatever `function` raises.
    """
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, threads) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise RuntimeError("the process died: it crashed, or there was not enough memory for it") from None


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes that a call reaches above what was held before: CUDA's count, or the resident set on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        refs.write_text("5")
    except OSError:
        return None
    before = _field(status, "VmRSS")
    call()
    return max(0, _field(status, "VmHWM") - before)


def _field(status: Path, name: str) -> int:
    line = next(x for x in status.read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
