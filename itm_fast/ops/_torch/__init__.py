"""The `torch` backend: the ops' algebra in batched PyTorch, on any device torch has, blocked to a memory bound."""
