"""Where the Triton kernels are tested: on CUDA devices, and without one on the CPU under Triton's interpreter."""

import pytest
import torch

import itm_fast

GPU = torch.cuda.is_available()
HALVES = {"cpu": [torch.float16], "cuda": [torch.float16, torch.bfloat16]}  # the interpreter has no bfloat16 products


def unless(backend, device):
    """A mark that skips with the reason why a backend cannot run."""
    reason = itm_fast.why_not(backend, device)
    if reason is None and device == "cpu" and GPU:
        reason = "the kernels are compiled for the GPU that is here, and are tested there"
    return pytest.mark.skipif(reason is not None, reason=str(reason))


INTERPRETED = pytest.param("cpu", "triton", marks=unless("triton", "cpu"), id="interpreted")
ON_GPU = pytest.param("cuda", "triton", marks=[pytest.mark.gpu, unless("triton", "cuda")], id="cuda-triton")
PORTABLE = pytest.param("cuda", "torch", marks=[pytest.mark.gpu, unless("torch", "cuda")], id="cuda-torch")
EVERYWHERE = pytest.mark.parametrize("device,backend", [INTERPRETED, ON_GPU, PORTABLE])
TRITON = pytest.mark.parametrize("device,backend", [INTERPRETED, ON_GPU])
gpu = pytest.mark.gpu
needs_triton = unless("triton", "cuda")


def dtypes(device):
    return [torch.float32, *HALVES[device]]


def placed(args, device, dtype=None):
    """Arguments on a device, those of floats in a dtype."""
    return [a.to(device, dtype) if a.is_floating_point() else a.to(device) for a in args]
