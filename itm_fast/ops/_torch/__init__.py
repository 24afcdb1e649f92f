"""The `torch` backend: the ops in batched PyTorch, on any device, block by block within a memory limit."""

import torch

# glibc gives free memory at the end of its heap back to the system where it is more than twice the largest block, of at
# most 32 MiB, that was ever freed. Freeing this one, which nothing is written to, keeps up to 62 MiB. Without it, all
# temporaries of a small process lie in fresh pages in every call, which took a sixth of RCAR's time for 8 x 8 pairs.
torch.UntypedStorage(31 << 20)
