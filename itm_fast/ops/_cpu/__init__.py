"""The `cpu` backend: each op hands its tensors to the C++ kernels of csrc/cpu."""

import torch

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype of csrc/cpu/pack.h


def bfloat16_products(dtype: torch.dtype) -> bool:
    """Whether products may multiply bfloat16 values: bfloat16 inputs, or float32 ones where torch may do it too."""
    medium = torch.get_float32_matmul_precision() == "medium"
    return dtype == torch.bfloat16 or (dtype == torch.float32 and medium)
