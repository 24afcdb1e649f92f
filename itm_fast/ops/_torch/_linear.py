"""x W^T + b by the faster of the two libraries that PyTorch has for it on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import matmul_precision

# From so many results a row on the three products of _Linear are faster than a convolution and its own backward:
# measured at 1,024, 118 ms where MKL takes 178; at 256 a training step of SGR takes longer.
WIDE = 512


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [..., K], weight [S, K] and bias [S] -> [..., S], as torch.nn.functional.linear."""
    if not _onednn(x):
        return F.linear(x, weight, bias)
    product = _Linear.apply if weight.shape[0] >= WIDE else _convolution
    return _rows(product(x.reshape(-1, x.shape[-1]), weight, bias)).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """Both passes by products.

    The result is the convolution's own: a view made in here could not be changed in place.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolution(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), needs, grad = ctx.saved_tensors, ctx.needs_input_grad, _rows(grad)
        return (
            _rows(_convolution(grad, weight.t())) if needs[0] else None,
            _rows(_convolution(grad.t(), x.t())) if needs[1] else None,
            grad.sum(0) if needs[2] else None,
        )


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of rows [n, K] by a 1 x 1 convolution, [1, S, n, 1]."""
    n, K = x.shape
    pixels = x.reshape(1, n, 1, K).permute(0, 3, 1, 2)  # channels-last, as oneDNN wants them, where x lies by rows
    # It reads a bias as if its elements were neighbours.
    bias = None if bias is None else bias.contiguous()
    kernel = weight.contiguous()[:, :, None, None]
    return torch.mkldnn_convolution(pixels, kernel, bias, (0, 0), (1, 1), (1, 1), 1)


def _rows(pixels: Tensor) -> Tensor:
    """[1, S, n, 1] -> [n, S]."""
    return pixels[0, :, :, 0].t()


def _onednn(x: Tensor) -> bool:
    """Where a 1 x 1 convolution, which is oneDNN's, beats the matrix product, which is MKL's.

    MKL keeps to AVX2 on processors that are not Intel's; oneDNN uses what there is and takes half the time.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.is_autocast_enabled("cpu")
        and matmul_precision() == "highest"  # F.linear may multiply in bfloat16 where that is allowed
    )
