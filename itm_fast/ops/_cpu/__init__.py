"""The `cpu` backend: each op hands its tensors to the C++ kernels of csrc/cpu."""

import torch

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype of csrc/cpu/pack.h
