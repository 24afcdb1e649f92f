"""Timing that is reliable on a noisy machine: alternating runs in one process, medians, results checked first."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from itm_fast import _backends, _triton
from itm_fast._files import atomic_write

RESULTS = Path(__file__).resolve().parent / "results"
BFLOAT16 = ", bfloat16 products"  # ends the name of a contender whose float32 matrix products may be of bfloat16 values


def backends(device: str) -> list[str]:
    """The backends that can run here, the reference and an interpreter of kernels left out."""
    left_out = ("reference", "triton") if _triton.interpreted() else ("reference",)
    return [n for n in _backends.NAMES if n not in left_out and _backends.why_not(n, device) is None]


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """Float32 matrix products are exact, dtype "float32", or may be of bfloat16 values."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    for n in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
            progress(f"round {n + 1} of {rounds}, {name}: {times[name][-1]:.3f} s")
    return times


def progress(line: str) -> None:
    """Print a line of progress on standard error."""
    print(f"  {line}", file=sys.stderr, flush=True)


def row(
    name: str, times: list[float], pairs: int, flops: float, base: float, *, products: str = "float32", **more: object
) -> dict:
    """One contender's row: median and spread, rates, the ratio to the base's median.

    Args:
        name: of the contender.
        times: seconds of every round.
        pairs: pairs scored in one call.
        flops: operations that one call needs.
        base: median seconds of the paper's loop.
        products: dtype of the factors of its matrix products: its rate is compared with the peak of this dtype.
        more: further fields.
    """
    median = statistics.median(times)
    return {
        "name": name,
        "seconds_median": median,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "pairs_per_second": pairs / median,
        "needed_gflops_per_second": flops / median / 1e9,
        "products": products,
        "times_faster_than_loop": base / median,
        **more,
    }


def hold_against(peak: dict[str, float | None], results: list[dict]) -> None:
    """Add to every row its rate as a fraction of the machine's peak (`machine.peaks`)."""
    for r in (r for one in results for r in one["rows"]):
        rate, fma = 1e9 * r["needed_gflops_per_second"], peak[f"fma_{r['products']}"]
        r["fraction_of_peak"] = fma and rate / fma
        r["fraction_of_matmul_peak"] = rate / peak["matmul_float32"]


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def show(title: str, rows: list[dict], left_out: dict[str, str]) -> None:
    """Print the rows of one workload as a table, and why a contender is missing."""
    heads = ("median s", "spread", "pairs/s", "of FMA peak", "of matmul", "x loop", "max diff", "peak MiB")
    print(f"\n{title}\n  {'':46}" + "".join(f"{h:>14}" for h in heads))
    for r in rows:
        cells = (
            f"{r['seconds_median']:.3f}",
            f"{r['seconds_min']:.3f}-{r['seconds_max']:.3f}",
            f"{r['pairs_per_second']:,.0f}",
            percent(r["fraction_of_peak"]),
            percent(r["fraction_of_matmul_peak"]),
            f"{r['times_faster_than_loop']:.2f}",
            f"{r['largest_difference']:.1e}",
            mebibytes(r.get("peak_bytes")),
        )
        print(f"  {r['name']:46}" + "".join(f"{c:>14}" for c in cells))
    for name, why in left_out.items():
        print(f"  {name}: left out, {why}")
    sys.stdout.flush()


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"


def mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"


def earlier(name: str, head: dict) -> tuple[list[dict], dict[str, float | None] | None]:
    """The models' results in a result file and its peaks (`machine.peaks`), for a run that adds models to the file.

    Args:
        name: the file's, without .json; it need not exist.
        head: of this run's file, as `machine.head` makes it.

    Raises:
        SystemExit: the file was measured elsewhere, at another commit, or in another way.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return [], None
    found = json.loads(path.read_text())
    for name, now in {"shape": head["shape"], "rounds": head["rounds"], **head["environment"]}.items():
        was = found.get(name, found["environment"].get(name))
        if was != now and name != "date":
            why = f"{path.name} has {name} {was}, and this run {now}"
            raise SystemExit(f"{why}: give another --write, or leave --add out")
    giga = {"matmul_float32": found["matmul_peak_gflops"]}
    giga |= {f"fma_{dtype}": rate for dtype, rate in found["fma_peak_gflops"].items()}
    return found["results"], {name: rate and 1e9 * rate for name, rate in giga.items()}


def write(name: str, result: dict) -> Path:
    """Write one result file atomically."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1) + "\n")
    return path
