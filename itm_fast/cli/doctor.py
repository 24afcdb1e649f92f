"""`itm-fast doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import itm_fast

HELP = """Show versions, devices, which backend each operation uses here and why the others cannot run, and
check every backend that can run against the reference.

Exits with 1 when a check fails or a required package does not import, so that scripts can test for it."""

_REQUIRED = {
    name: {"pillow": "PIL"}.get(name, name) for name in ("numpy", "h5py", "einops", "ninja", "nltk", "pillow", "tqdm")
}  # distribution -> module
_OPTIONAL = {
    "eccv-caption": "`evaluate` with CxC and ECCV metrics",
    "tensorboard": "`train --tensorboard`",
    "faiss-cpu": "`search --candidates` above a million images",
    "timm": "`features --backbone timm:NAME`",
    "torchvision": "`features --backbone torchvision:NAME`",
    "triton": "Triton kernels on CUDA devices",
}
_VARIABLES = (
    "ITM_FAST_BACKEND",
    "ITM_FAST_AMX",
    "ITM_FAST_BFLOAT16",
    "ITM_FAST_CACHE_DIR",
    "ITM_FAST_DEBUG",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NLTK_DATA",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `itm-fast doctor`."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when something is broken."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """All that `itm-fast doctor` reports, as plain values.

    Returns:
        A dict with versions, packages, optional, cpu, native (the C++ kernels: level, compiler, library, cache folder,
        and why they cannot run), cuda (NVRTC, the driver, the CUDA kernels of these sources that are compiled on this
        machine, and how many kernels of others the cache folder holds), devices,
        backends (per device: name -> None, or why it cannot run), operations (per op: the backends it has, and the one
        that auto chooses per device), nltk_punkt, environment, checks, ok.

    >>> examine()["backends"]["cpu"]["torch"] is None
    True
    """
    import torch

    from .. import _backends, _native, ops
    from .._checks import matmul_precision

    assert ops.__all__  # importing the ops has filled _backends.OFFERS
    devices = _devices()
    packages = {name: _package(name, module) for name, module in _REQUIRED.items()}
    checks = [_check(op, backend, device) for device in devices for op, backend in _runnable(device)]
    return {
        "ok": all(check["ok"] for check in checks) and all(found["problem"] is None for found in packages.values()),
        "versions": {
            "itm-fast": itm_fast.__version__,
            "installed at": str(Path(itm_fast.__file__).parent),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda,
            "system": platform.platform(),
        },
        "packages": packages,
        "optional": {name: _version(name) for name in _OPTIONAL},
        "cpu": {
            "model": _native.peaks.processor()["model name"],
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "MKL": torch.backends.mkl.is_available(),
            "oneDNN": torch.backends.mkldnn.is_available(),
            "float32 matrix products": matmul_precision(),
        },
        "native": _kernels(),
        "cuda": _cuda_kernels(),
        "devices": devices,
        "backends": {device: {n: _backends.why_not(n, device) for n in _backends.NAMES} for device in devices},
        "operations": {
            op: {"offered": list(offered), "auto": {device: _choice(op, device) for device in devices}}
            for op, offered in sorted(_backends.OFFERS.items())
        },
        "nltk_punkt": _punkt(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "checks": checks,
    }


def _devices() -> dict[str, dict[str, Any]]:
    import torch

    from .. import _native

    processor = _native.peaks.processor()["model name"]
    devices: dict[str, dict[str, Any]] = {"cpu": {"name": processor, "memory_gib": _host_memory()}}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            devices[f"cuda:{index}"] = {
                "name": properties.name,
                "memory_gib": round(total / 2**30, 1),
                "free_gib": round(free / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
    if torch.backends.mps.is_available():
        devices["mps"] = {"name": "Apple GPU", "memory_gib": _host_memory()}
    return devices


def _kernels() -> dict[str, Any]:
    """The C++ kernels of this machine; compiles them if that has not been done before."""
    from .. import _native

    try:
        cache = str(_native.cache_dir())
    except RuntimeError as error:
        cache = f"none: {error}"
    built = _native.outcome()
    if isinstance(built, str):
        found: dict[str, Any] = {"why not": built, "level": None, "compiler": None, "library": None}
        return {**found, "cache folder": cache, "bfloat16 products": None}
    library = built.path and str(built.path)
    return {
        "why not": None,
        "level": built.level,
        "compiler": built.compiler,
        "library": library,
        "cache folder": cache,
        "bfloat16 products": _bfloat16(),
    }


def _cuda_kernels() -> dict[str, Any]:
    """What compiles the CUDA kernels and what runs them, or why neither is there; and what is kept of them."""
    from .._cuda import cubins, driver, nvrtc

    compiler = nvrtc.why_not() or f"{nvrtc.library().version} ({nvrtc.library().path})"
    runs = driver.why_not() or f"runs CUDA {driver.version()}"
    kept = cubins.kept()
    told = [
        {name: value for name, value in kernel.items() if name not in ("sha256", "current")}
        for kernel in kept
        if kernel["current"]
    ]
    return {"NVRTC": compiler, "driver": runs, "kernels": told, "older kernels": len(kept) - len(told)}


def _bfloat16() -> str:
    """Whether bfloat16 inputs, and float32 ones at medium precision, are multiplied as bfloat16 values, and why."""
    from .. import _native

    try:
        used, why = _native.bfloat16_products()
    except ValueError as error:
        return f"refused: {error}"
    return f"used: {why}" if used else f"not used, float32 products run instead: {why}"


def _host_memory() -> float | None:
    """Memory this process may use: the machine's, or its control group's limit when that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return round(total / 2**30, 1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, module: str) -> dict[str, str | None]:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything while it is imported
        return {"version": _version(name), "problem": f"does not import: {type(error).__name__}: {error}"}
    return {"version": _version(name), "problem": None}


def _punkt() -> bool:
    """Whether NLTK has the data that `itm_fast.data.tokenize` needs to split captions into sentences."""
    try:
        from nltk.tokenize import word_tokenize

        word_tokenize("one. two.")
    except Exception:  # LookupError without the data; anything at all when NLTK itself is broken
        return False
    return True


def _choice(op: str, device: str) -> str:
    import torch

    from .. import _backends

    try:
        with warnings.catch_warnings():  # the report says why
            warnings.simplefilter("ignore")
            return _backends.resolve(op, None, torch.device(device))
    except (NotImplementedError, ValueError) as error:
        return f"none: {error}"


def _runnable(device: str) -> Iterator[tuple[str, str]]:
    from .. import _backends, _triton

    for op, offered in sorted(_backends.OFFERS.items()):
        for backend in offered:
            interpreted = backend == "triton" and _triton.interpreted()  # would not test the compiled kernels
            if backend != "reference" and not interpreted and _backends.why_not(backend, device) is None:
                yield op, backend


def _check(op: str, backend: str, device: str) -> dict[str, Any]:
    """One op on a few pairs, forward and backward, against the reference in float64."""
    import torch

    from .. import testing
    from ..ops._examples import outcome

    result = {"operation": op, "backend": backend, "device": device, "ok": True, "problem": None}
    try:
        found = outcome(op, backend, device, torch.float32)
        testing.assert_accurate(
            found, lambda dtype: outcome(op, "reference", "cpu", dtype, rounded=torch.float32), torch.float32
        )
    except Exception as error:  # a broken installation may raise anything; it is reported
        result.update(ok=False, problem=f"{type(error).__name__}: {error}".splitlines()[0])
    return result


def _text(report: dict[str, Any]) -> str:
    lines: list[str] = []

    def section(title: str, rows: dict[str, Any]) -> None:
        width = max((len(name) for name in rows), default=0)
        lines.extend(["", title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])

    section("Versions", report["versions"])
    packages = {name: found["problem"] or found["version"] for name, found in report["packages"].items()}
    optional = {
        name: version or f"not installed; needed for {_OPTIONAL[name]}" for name, version in report["optional"].items()
    }
    section("Packages", packages | optional)
    punkt = (
        "present"
        if report["nltk_punkt"]
        else (
            "absent: captions of several sentences are not split into sentences; "
            "`python -m nltk.downloader punkt_tab` installs it"
        )
    )
    section("NLTK data", {"punkt": punkt})
    section("CPU", report["cpu"])
    native = report["native"]
    kept = native["library"] or "not kept: the cache folder cannot be written, so each process compiles its own"
    section(
        "C++ kernels",
        {"cannot run": native["why not"], "cache folder": native["cache folder"]}
        if native["why not"]
        else {
            "compiled for": native["level"],
            "compiler": native["compiler"],
            "library": kept,
            "bfloat16": native["bfloat16 products"],
        },
    )
    section("CUDA kernels", _cuda_rows(report["cuda"]))
    section("Devices", {device: _device_line(found) for device, found in report["devices"].items()})
    for device, reasons in report["backends"].items():
        section(f"Backends on {device}", {name: reason or "can run" for name, reason in reasons.items()})
    for device in report["devices"]:
        chosen = {
            op: f"{found['auto'][device]}  (offers {', '.join(found['offered'])})"
            for op, found in report["operations"].items()
        }
        section(f"What runs on {device}", chosen)
    section("Environment", report["environment"] or {"": "none of the variables that matter is set"})
    outcome = {
        f"{check['operation']} {check['backend']} {check['device']}": check["problem"] or "ok"
        for check in report["checks"]
    }
    section("Checks against the reference", outcome)
    lines.extend(["", "All is well." if report["ok"] else "Something is broken: see above."])
    return "\n".join(lines[1:])


def _device_line(found: dict[str, Any]) -> str:
    memory = "memory unknown" if found["memory_gib"] is None else f"{found['memory_gib']} GiB"
    if "free_gib" in found:
        memory += f" ({found['free_gib']} free), compute capability {found['compute_capability']}"
    return f"{found['name']}, {memory}"


def _cuda_rows(found: dict[str, Any]) -> dict[str, str]:
    rows = {"NVRTC": found["NVRTC"], "driver": found["driver"]}
    for kernel in found["kernels"]:
        spilled = f"{kernel['spilled']} bytes spilled" if kernel["spilled"] else "none spilled"
        rows[f"{kernel['kernel']} for sm_{kernel['architecture']}"] = (
            f"{kernel['registers']} registers, {spilled}, compiled by NVRTC {kernel['nvrtc']}"
        )
    if older := found["older kernels"]:
        rows["not used"] = f"{older} more in the cache folder, compiled from other sources or by another NVRTC"
    return rows
