"""Fast, exact region-word cross-attention for image-text matching.

>>> import torch, itm_fast
>>> image = torch.randn(4, 36, 64)                                  # [I, R, D]
>>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, 64), [12, 7, 9])
>>> itm_fast.cross_attention_score(image, words, cu_seqlens).shape  # [I, T]
torch.Size([4, 3])
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a source checkout kernels/ lies beside this folder; in a wheel it lies inside it.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

from ._backends import use_backend, why_not  # noqa: E402
from ._workspace import workspace  # noqa: E402
from .ops import (  # noqa: E402
    cross_attention_score,
    cross_attention_similarity,
    global_local_score,
    hardest_negative_loss,
    hierarchical_alignment_score,
    similarity_context,
    similarity_filter,
    similarity_filter_score,
    similarity_graph,
    similarity_graph_score,
    similarity_nodes,
)
from .packing import pack, unpack  # noqa: E402

__all__ = [
    "cross_attention_score",
    "cross_attention_similarity",
    "global_local_score",
    "hardest_negative_loss",
    "hierarchical_alignment_score",
    "pack",
    "similarity_context",
    "similarity_filter",
    "similarity_filter_score",
    "similarity_graph",
    "similarity_graph_score",
    "similarity_nodes",
    "unpack",
    "use_backend",
    "why_not",
    "workspace",
]
