"""Timing that can be believed on a noisy machine: alternating runs in one process, medians, results checked first."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

import itm_fast

RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict:
    """Versions, device, threads and commit, for the result file."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {
        "itm_fast": itm_fast.__version__,
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every call once per round, in turn, so that a slow spell of the machine hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def peak_flops(device: str = "cpu") -> float:
    """Multiply-adds per second x 2 of a large float32 matrix product, the rate that products in PyTorch can reach."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5))


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


def row(name: str, times: list[float], pairs: int, flops: float, peak: float, base: float, **more: object) -> dict:
    """One contender's row: median and spread, rates, the ratio to the base's median."""
    median = statistics.median(times)
    return {
        "name": name,
        "seconds_median": median,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "pairs_per_second": pairs / median,
        "needed_gflops_per_second": flops / median / 1e9,
        "fraction_of_matmul_peak": flops / median / peak,
        "times_faster_than_loop": base / median,
        **more,
    }


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def show(title: str, rows: list[dict]) -> None:
    """Print the rows of one workload as a table."""
    heads = ("median s", "spread", "pairs/s", "of peak", "x loop", "max diff", "peak MiB")
    print(f"\n{title}\n  {'':20}" + "".join(f"{h:>14}" for h in heads))
    for r in rows:
        cells = (
            f"{r['seconds_median']:.3f}",
            f"{r['seconds_min']:.3f}-{r['seconds_max']:.3f}",
            f"{r['pairs_per_second']:,.0f}",
            f"{r['fraction_of_matmul_peak']:.0%}",
            f"{r['times_faster_than_loop']:.2f}",
            f"{r['largest_difference']:.1e}",
            "-" if r.get("peak_bytes") is None else f"{r['peak_bytes'] / 2**20:.0f}",
        )
        print(f"  {r['name']:20}" + "".join(f"{c:>14}" for c in cells))


def write(name: str, result: dict) -> Path:
    """Write one result file, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
    return path
