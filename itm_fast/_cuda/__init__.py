"""The CUDA C++ kernels of csrc/cuda: NVRTC compiles each once per machine, and the NVIDIA driver runs it.

Neither a compiler nor a CUDA header is needed. `nvrtc` compiles, `cubins` keeps what it has compiled in the cache
folder of the C++ kernels, `driver` loads and launches; both libraries are called through ctypes.

A kernel takes one struct by value. A `ctypes.Structure` of the same name is its twin in Python, and `layout_checks`
has the compiler compare the two.
"""

from __future__ import annotations

import ctypes
import threading
import warnings

import torch

from .._native import Unavailable
from .._nvidia import NO_FLOAT64
from .._nvidia import why_not as too_old
from . import cubins, driver, nvrtc
from .cubins import Kernel
from .layout import layout_checks

__all__ = ["LEAST", "Kernel", "Unavailable", "launch", "layout_checks", "why_not"]

LEAST = (7, 5)  # least compute capability: it brought ldmatrix and the products m16n8k8 of float16
BFLOAT16 = (8, 0)  # least compute capability for products of bfloat16

SPECIFIC = (9, 0)  # the compute capability that some kernels have variants for, which no other GPU runs
# Variants of kernels: for all GPUs; by wgmma; by wgmma, in clusters of blocks that share what they read.
GENERAL, GROUPS, CLUSTERS = range(3)

# (op, device, dtype) that asked for variants -> the best that it may use
_variants: dict[tuple[str, int | None, torch.dtype], int] = {}
# Of each device: where kernels write whether a block of a cluster has given up waiting for another, in memory of the
# host that the GPU can write to; and those devices where one has.
_gave_up: dict[int | None, torch.Tensor] = {}
_without_clusters: set[int | None] = set()
_functions: dict[tuple[Kernel, int | None], driver.Function] = {}
_lock = threading.Lock()


def why_not(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """None if the CUDA kernels can run on the device in this dtype, else one sentence that says what is missing."""
    if device.type != driver.DEVICE:
        return f"needs CUDA tensors, got {device.type}"
    if dtype == torch.float64:
        return NO_FLOAT64
    if problem := too_old(device, LEAST) or nvrtc.why_not() or driver.why_not():
        return problem
    capability = torch.cuda.get_device_capability(device)
    name = f"compute capability {'.'.join(map(str, capability))}"
    if dtype == torch.bfloat16 and capability < BFLOAT16:
        return f"a GPU of {name} cannot multiply bfloat16 values; float16 and float32 run on it"
    library = nvrtc.library()
    if _architecture(capability) not in library.architectures:
        return f"NVRTC {library.version} cannot compile for {name}; install a newer CUDA build of torch"
    return None


def variant(op: str, device: torch.device, dtype: torch.dtype) -> int:
    """The best variant of an op's kernels that may run on a device: `GENERAL`, `GROUPS` or `CLUSTERS`."""
    if torch.cuda.get_device_capability(device) != SPECIFIC:
        return GENERAL
    found = _variants.setdefault((op, device.index, dtype), CLUSTERS)
    if found == CLUSTERS:
        what = f"scores that {op} or another op has returned since the last call may be NaN: compute them again"
        warn_of_fault(device, what)
    return min(found, GROUPS) if device.index in _without_clusters else found


def asked_variant(op: str, device: torch.device, dtype: torch.dtype) -> int:
    """The variant that an op may use at best, if it has run on a device in a dtype; else `GENERAL`."""
    return _variants.get((op, device.index, dtype), GENERAL)


def allow_variant(op: str, device: torch.device, dtype: torch.dtype, best: int) -> None:
    """From now on use no better variant of an op than `best`."""
    _variants[op, device.index, dtype] = best


def drop_fault(device: torch.device) -> None:
    """Use no clusters on a device any more if a block of one has given up waiting, and say nothing about scores.

    For a check that has failed: what it computed is dropped. Of calls before the check, `variant` has told when it
    began, as its arguments are copied to the device once these calls have ended.
    """
    if cluster_fault(device):
        _without_clusters.add(device.index)
        _gave_up[device.index].zero_()


def fault_address(device: torch.device) -> int:
    """Where kernels on a device write whether a block of a cluster has given up waiting."""
    if device.index not in _gave_up:
        _gave_up[device.index] = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return _gave_up[device.index].data_ptr()


def cluster_fault(device: torch.device) -> bool:
    """Whether a block of a cluster on a device has given up waiting, as far as kernels have come."""
    index = _index(device)
    return index in _gave_up and bool(_gave_up[index].item())


def warn_of_fault(device: torch.device, what: str) -> None:
    """If a block of a cluster on a device has given up waiting, say so once and use no clusters there any more.

    Args:
        device: any; on others than CUDA devices nothing happens.
        what: what follows from it.
    """
    if cluster_fault(device) and _index(device) not in _without_clusters:
        _without_clusters.add(_index(device))
        warnings.warn(
            f"thread blocks on {device} waited in vain for each other, and {what}. From now on kernels run without "
            "clusters there",
            stacklevel=3,
        )


def _index(device: torch.device) -> int | None:
    """The number of a device, also of "cuda" without one; where no kernel has run CUDA is not asked."""
    return torch.cuda.current_device() if device == torch.device("cuda") and _gave_up else device.index


def _architecture(capability: tuple[int, int]) -> int:
    return 10 * capability[0] + capability[1]


def launch(kernel: Kernel, problem: ctypes.Structure, grid: tuple[int, int], device: torch.device) -> None:
    """Run a kernel on the current stream of a device; its first launch there compiles or loads it.

    Args:
        kernel: what to run.
        problem: its argument, of the type `kernel.structure`. Its pointers are to memory of the device; the struct
            itself is copied before this returns.
        grid: blocks in x and y; where one is 0, nothing runs.
        device: the device of the tensors that `problem` points to.

    Raises:
        RuntimeError: the kernel cannot be compiled, loaded or launched; or this is its first launch on the device while
            a CUDA graph is captured, when nothing can be loaded.
        torch.OutOfMemoryError: the GPU has too little memory to load the kernel.
    """
    if 0 in grid:
        return
    function = _functions.get((kernel, device.index)) or load(kernel, device)
    driver.launch(function, problem, grid, kernel.threads, kernel.shared, device)


def load(kernel: Kernel, device: torch.device) -> driver.Function:
    """Compile a kernel for a device, unless that has been done on this machine, and load it there.

    Raises:
        RuntimeError, torch.OutOfMemoryError: as `launch` says.
    """
    # Compiling needs no lock of its own: `cubins.build` has one for each kernel, so others may compile beside it.
    built = cubins.build(kernel, _architecture(torch.cuda.get_device_capability(device)))
    with _lock:
        key = kernel, device.index
        if key not in _functions:
            _functions[key] = driver.load(built.code, built.entry, kernel.name, kernel.shared, device)
        return _functions[key]
