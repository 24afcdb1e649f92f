"""Where the Triton kernels are tested: on CUDA devices, and without one on the CPU under Triton's interpreter."""

import weakref

import pytest
import torch

import itm_fast
from itm_fast.testing import op_checks

GPU = torch.cuda.is_available()
HALVES = {"cpu": [torch.float16], "cuda": [torch.float16, torch.bfloat16]}  # the interpreter has no bfloat16 products


def unless(backend, device):
    """A mark that skips with the reason why a backend cannot run."""
    reason = itm_fast.why_not(backend, device)
    if reason is None and device == "cpu" and GPU:
        reason = "the kernels are compiled for the GPU that is here, and are tested there"
    return pytest.mark.skipif(reason is not None, reason=str(reason))


INTERPRETED = pytest.param("cpu", "triton", marks=[pytest.mark.slow, unless("triton", "cpu")], id="interpreted")
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


def check_blocks(call, args, dtype, gib, within, exact=0):
    """Gradients made block by block in `gib` GiB of workspace are those of one block: the first `exact` to the bit, the
    others but for a share `within` of their largest."""
    want = op_checks.gradients(call, args, dtype, "triton", dtype)
    with itm_fast.workspace(gib):
        found = op_checks.gradients(call, args, dtype, "triton", dtype)
    for k, (a, b) in enumerate(zip(found, want, strict=True)):
        allowed = 0 if k < exact else within * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=allowed)


class Scratch:
    """Bytes of tensors that live at a time: `peak` of what the watched functions made, but for those `left_out`."""

    def __init__(self, monkeypatch, left_out=lambda tensor: False):
        self.monkeypatch, self.left_out, self.live, self.peak = monkeypatch, left_out, 0, 0

    def watch(self, owner, *names):
        for name in names:
            self.monkeypatch.setattr(owner, name, self._spy(getattr(owner, name)))

    def _spy(self, function):
        def allocate(*args, **options):
            tensor = function(*args, **options)
            if not self.left_out(tensor):
                self._add(tensor.nbytes)
                weakref.finalize(tensor, self._add, -tensor.nbytes)
            return tensor

        return allocate

    def _add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)
