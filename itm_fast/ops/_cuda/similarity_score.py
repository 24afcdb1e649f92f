"""The pair scorers around a head in CUDA C++: equations in `ops/similarity_score.py`, kernels in csrc/cuda."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from ..._cuda import CLUSTERS, GENERAL, Kernel
from ..._folding import folded_exactly
from . import _pairs
from ._pairs import THREADS, Kind, Nodes, kind_of, making_bytes, rounded_up, rows_of, scores, tile_bytes
from .cross_attention_score import aligned


class Graph(ctypes.Structure):
    """The argument of `graph_scores` (csrc/cuda/graph.cu)."""

    _fields_ = [
        ("nodes", Nodes),
        *((name, ctypes.c_void_p) for name in ("ask", "value", "shift", "bias", "ask_exponent", "value_exponent")),
        *((name, ctypes.c_void_p) for name in ("score_weight", "score_bias", "score")),
        *((name, ctypes.c_int) for name in ("steps", "all_captions", "logit")),
    ]


class Filter(ctypes.Structure):
    """The argument of `filter_scores` (csrc/cuda/filter.cu)."""

    _fields_ = [
        ("nodes", Nodes),
        *((name, ctypes.c_void_p) for name in ("gate_weight", "gate_bias", "score_weight", "score_bias", "score")),
        ("all_captions", ctypes.c_int),
        ("logit", ctypes.c_int),
    ]


def _kernel(
    file: str, stem: str, structure: type[ctypes.Structure], shared: int, variant: int, arguments: str
) -> Kernel:
    name, cluster = (f"{stem}_in_clusters", 2) if variant == CLUSTERS else (stem, 1)
    return Kernel(file, f"{name}<{arguments}>", structure, THREADS, shared, variant != GENERAL, cluster)


def graph_kernel(kind: Kind, S: int, slots: int, regions: int, depth: int, variant: int, longest: int) -> Kernel:
    nodes, blocks = 2 * slots * S * kind.halves, slots // 16
    last = 8 * (2 * S * kind.halves + 4 * (S + 4)) + 8 * blocks  # captions' rows in the last step
    more = max(rounded_up(last, 1024), 0 if variant != GENERAL else nodes + 2 * slots**2 * kind.halves)
    room = max(making_bytes(kind, slots, depth, regions, variant), nodes + more)
    tops = 8 * (blocks if kind.scaled else 1) + 8 * (slots if kind.scaled and variant == GENERAL else 1)
    places = 4 if variant == CLUSTERS and kind.halves == 1 else 2
    shared = room + tile_bytes(kind, S, slots, depth, variant, places) + THREADS + tops
    arguments = kind.arguments(S, slots, depth, regions, longest=longest)
    return _kernel("graph.cu", "graph_scores", Graph, shared, variant, arguments)


def filter_kernel(kind: Kind, S: int, slots: int, regions: int, depth: int, variant: int, longest: int) -> Kernel:
    room = max(making_bytes(kind, slots, depth, regions, variant), 2 * slots * S * kind.halves)
    places = 2 if variant != CLUSTERS else 4 if kind.halves == 1 else 3  # of more, room is short of 32 KB for S = 256
    shared = room + tile_bytes(kind, S, slots, depth, variant, places) + slots // 4
    arguments = kind.arguments(S, slots, depth, regions, longest=longest)
    return _kernel("filter.cu", "filter_scores", Filter, shared, variant, arguments)


HEADS = {"similarity_graph_score": graph_kernel, "similarity_filter_score": filter_kernel}


def compilations(capability: tuple[int, int]) -> list[Kernel]:
    """All that may run on a GPU of a compute capability, for the published sizes."""
    return [kernel for head in HEADS.values() for kernel in _pairs.compilations(head, capability)]


def why_not(
    op: str, dtype: torch.dtype, size: Mapping[str, int], words: int, capability: tuple[int, int]
) -> str | None:
    """Why the kernels of a scorer cannot take some sizes; see `_pairs.why_not`."""
    return _pairs.why_not(HEADS[op], dtype, size, words, capability)


def similarity_graph_score(
    image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor,
    local_weight: Tensor, local_bias: Tensor, global_weight: Tensor, global_bias: Tensor,
    query_weight: Tensor, query_bias: Tensor, key_weight: Tensor, key_bias: Tensor, value_weight: Tensor,
    value_bias: Tensor, score_weight: Tensor, score_bias: Tensor,
    cu_seqlens: Tensor, region_lengths: Tensor | None, scale: float, output: str,
) -> Tensor:  # fmt: skip
    """Scores or logits [I, T]; key_bias has no effect on them."""
    nodes = (
        image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias, cu_seqlens,
        region_lengths, scale,
    )  # fmt: skip
    kind, (folded, shift) = kind_of(image.dtype), folded_exactly(query_weight, query_bias, key_weight)
    ask, value = rows_of(folded, kind), rows_of(value_weight, kind)
    vectors = [aligned(x.float()) for x in (shift, value_bias, score_weight, score_bias)]
    shift_at, bias_at, *end = (x.data_ptr() for x in vectors)
    pointers = *(x.addresses[0] for x in (ask, value)), shift_at, bias_at, ask.addresses[1], value.addresses[1], *end

    def problem(part: Nodes, score: int, captions: int) -> Graph:
        return Graph(part, *pointers, score, len(query_weight), captions, output == "logit")

    steps = [matrix for step in zip(ask.data, value.data) for matrix in step]
    return scores("similarity_graph_score", nodes, graph_kernel, problem, steps)


def similarity_filter_score(
    image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor,
    local_weight: Tensor, local_bias: Tensor, global_weight: Tensor, global_bias: Tensor,
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, score_weight: Tensor, score_bias: Tensor,
    running_mean: Tensor, running_var: Tensor,
    cu_seqlens: Tensor, region_lengths: Tensor | None, scale: float, eps: float, output: str,
) -> Tensor:  # fmt: skip
    """Scores or logits [I, T]."""
    nodes = (
        image, image_global, words, caption_global, local_weight, local_bias, global_weight, global_bias, cu_seqlens,
        region_lengths, scale,
    )  # fmt: skip
    # The normalisation is folded into the projection, in float64.
    slope = norm_weight.double() / (running_var.double() + eps).sqrt()
    gate_weight = aligned((weight.double() * slope).float())
    gate_bias = ((bias.double() - running_mean.double()) * slope + norm_bias.double()).float()
    given = gate_weight, gate_bias, aligned(score_weight.float()), score_bias.float()
    pointers = [x.data_ptr() for x in given]

    def problem(part: Nodes, score: int, captions: int) -> Filter:
        return Filter(part, *pointers, score, captions, output == "logit")

    return scores("similarity_filter_score", nodes, filter_kernel, problem)
