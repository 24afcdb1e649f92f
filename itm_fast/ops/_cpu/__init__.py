"""The `cpu` backend: each op hands its tensors to the C++ kernels of csrc/cpu."""
