"""Fast, exact region-word cross-attention for image-text matching.

>>> import torch, itm_fast
>>> image = torch.randn(4, 36, 64)                                  # [I, R, D]
>>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, 64), [12, 7, 9])
>>> itm_fast.cross_attention_score(image, words, cu_seqlens).shape  # [I, T]
torch.Size([4, 3])

The first use of one of these names imports torch. A program that calls only `torch.ops.itm_fast`, such as an exported
model, must import `itm_fast.ops` itself. These parts of the package are imported on first use:

    itm_fast.evaluation   recalls of models (`evaluate`) or of your own scores (`metrics(score, caption_to_image)`)
    itm_fast.models       SCAN, SGRAF and others by their published names; `load` reads a trained one, `build` makes one
    itm_fast.data         splits, vocabularies and batches of precomputed features
    itm_fast.training     the published recipes (`options`, `train`) and checkpoints
    itm_fast.nn           modules over the ops
    itm_fast.attention    what a model attends to in an image and a caption
    itm_fast.patch        replaces the slow loops of a published repository, which stays as it is
    itm_fast.Gallery      search in a folder of encoded images
"""

# ruff: noqa: F403, F405

import sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a source checkout kernels/ lies beside this folder; in a wheel it lies inside it.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

from ._lazy import lazy  # noqa: E402

if TYPE_CHECKING or "torch" in sys.modules:  # torch is loaded already: register the ops for torch.ops now
    from ._public import *
if TYPE_CHECKING:
    from .models import attention
    from .patching import patch, unpatch

__all__ = [
    "Gallery",
    "attended_vectors",
    "attention",
    "cross_attention_score",
    "cross_attention_similarity",
    "global_local_score",
    "hardest_negative_loss",
    "hierarchical_alignment_score",
    "pack",
    "patch",
    "similarity_context",
    "similarity_filter",
    "similarity_filter_score",
    "similarity_graph",
    "similarity_graph_score",
    "similarity_nodes",
    "unpack",
    "unpatch",
    "use_backend",
    "why_not",
    "workspace",
]

_PARTS = ("data", "evaluation", "models", "nn", "training")
# Names whose import costs more than the ops'.
_HOMES = {"attention": "models", "patch": "patching", "unpatch": "patching"}

__getattr__ = lazy(__name__, [name for name in __all__ if name not in _HOMES], _PARTS, _HOMES)
if "pdoc" in sys.modules:  # it documents the parts that __all__ names
    __all__ += _PARTS


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
