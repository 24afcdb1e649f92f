"""The public names of `itm_fast`. Importing this module imports torch and registers the ops."""

# ruff: noqa: F401

from ._backends import use_backend, why_not
from ._workspace import workspace
from .gallery import Gallery
from .ops import (
    attended_vectors,
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
from .packing import pack, unpack
