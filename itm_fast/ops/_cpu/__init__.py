"""The `cpu` backend: each op hands its tensors to the C++ kernels of csrc/cpu."""

import torch
from torch import Tensor

from ... import _native
from ..._checks import matmul_precision
from ...packing import bounds
from .. import _attention

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype of csrc/cpu/pack.h


def bfloat16_products(dtype: torch.dtype) -> bool:
    """Whether products multiply bfloat16 values: where that pays, those of bfloat16 inputs, and those of float32 ones
    where torch may do it too."""
    allowed = dtype == torch.bfloat16 or (dtype == torch.float32 and matmul_precision() == "medium")
    return allowed and _native.bfloat16_products()[0]


def lengths(
    op: str, image: Tensor, words: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """cu_seqlens and region_lengths as C++ takes them, checked, for it reads wherever they point."""
    edge = torch.tensor(bounds(cu_seqlens, words.shape[0], op), dtype=torch.int64)
    if region_lengths is None:
        return edge, None
    return edge, torch.tensor(_attention.region_counts(region_lengths, image, op), dtype=torch.int64)


def shape(image: Tensor, caption_global: Tensor, weight: Tensor) -> tuple[int, ...]:
    """What the pair scorers take of sizes: the dtype's code, I, R, T, D and S."""
    I, R, D = image.shape
    return DTYPES[image.dtype], I, R, len(caption_global), D, len(weight)
