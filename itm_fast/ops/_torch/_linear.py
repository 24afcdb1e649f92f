"""x W^T + b by the faster of the two libraries that PyTorch has for it on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import matmul_precision


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows [n, K], weight [S, K] and bias [S] -> [n, S], as torch.nn.functional.linear."""
    if not _onednn(x):
        return F.linear(x, weight, bias)
    n, K = x.shape
    pixels = x.reshape(1, n, 1, K).permute(0, 3, 1, 2)  # channels-last, as oneDNN wants them: no copy
    # It reads a bias as if its elements were neighbours.
    result = torch.mkldnn_convolution(pixels, weight[:, :, None, None], bias.contiguous(), (0, 0), (1, 1), (1, 1), 1)
    return result.permute(0, 2, 3, 1).reshape(n, -1)


def _onednn(x: Tensor) -> bool:
    """Where a 1 x 1 convolution, which is oneDNN's, beats the matrix product, which is MKL's.

    MKL keeps to AVX2 on processors that are not Intel's; oneDNN uses what there is and takes half the time.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and len(x) > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and matmul_precision() == "highest"  # F.linear may multiply in bfloat16 where that is allowed
    )
