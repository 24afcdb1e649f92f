"""x W^T + b on a CPU by MKL (F.linear) or by oneDNN (a 1 x 1 convolution), whichever is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import matmul_precision

# With at least this many outputs, `_Linear` is faster than a convolution with its own backward: measured at 1,024
# outputs, 118 ms where MKL takes 178. At 256 outputs a training step of SGR takes longer with it.
WIDE = 512
# The least rows and outputs for which a convolution pays: it lays out the weights in every call, and its backward pass
# does so again. Measured on a Zen 4, where AVX-512 has no more units than AVX2 and neither library is faster in large
# products: with 1,024 inputs and 256 outputs, 100 rows take 1.4 times as long as by MKL, 600 as long. With one output
# any number of rows takes three times as long.
ROWS, OUTPUTS = 512, 32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [..., K], weight [S, K] and bias [S] -> [..., S], as torch.nn.functional.linear."""
    if not _onednn(x, weight):
        return F.linear(x, weight, bias)
    product = _Linear.apply if weight.shape[0] >= WIDE else _convolution
    return _rows(product(x.reshape(-1, x.shape[-1]), weight, bias)).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """Forward and backward by `_convolution`.

    Returns pixels [1, S, n, 1], not rows: a view made inside an autograd.Function cannot be changed in place.
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
    pixels = x.reshape(1, n, 1, K).permute(0, 3, 1, 2)  # channels-last, which oneDNN reads without a copy
    # oneDNN ignores the bias's stride.
    bias = None if bias is None else bias.contiguous()
    kernel = weight.contiguous()[:, :, None, None]
    return torch.mkldnn_convolution(pixels, kernel, bias, (0, 0), (1, 1), (1, 1), 1)


def _rows(pixels: Tensor) -> Tensor:
    """[1, S, n, 1] -> [n, S]."""
    return pixels[0, :, :, 0].t()


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's 1 x 1 convolution can replace MKL's matrix product, and is faster.

    On processors that are not Intel's MKL uses AVX2 only; oneDNN uses AVX-512, which takes half the time on a Zen 5.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[-1] * ROWS <= x.numel() > 0
        and len(weight) >= OUTPUTS
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.is_autocast_enabled("cpu")
        and matmul_precision() == "highest"  # F.linear may multiply in bfloat16 where that is allowed
    )
