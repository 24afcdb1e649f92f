"""The ops: one file each, with its equations, declaration, reference and public function."""

from .attended_vectors import attended_vectors
from .cross_attention_score import cross_attention_score
from .cross_attention_similarity import cross_attention_similarity
from .global_local_score import global_local_score
from .hardest_negative_loss import hardest_negative_loss
from .hierarchical_alignment_score import hierarchical_alignment_score
from .similarity_context import similarity_context
from .similarity_filter import similarity_filter
from .similarity_graph import similarity_graph
from .similarity_nodes import similarity_nodes
from .similarity_score import similarity_filter_score, similarity_graph_score

__all__ = [
    "attended_vectors",
    "cross_attention_score",
    "cross_attention_similarity",
    "global_local_score",
    "hardest_negative_loss",
    "similarity_context",
    "hierarchical_alignment_score",
    "similarity_filter",
    "similarity_filter_score",
    "similarity_graph",
    "similarity_graph_score",
    "similarity_nodes",
]
