"""The `torch` backend: the ops in batched PyTorch, on any device, block by block within a memory limit."""
