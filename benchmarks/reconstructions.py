"""HGAN and TSHSR for the benchmarks of whole models: their scorers, their loops, and the operations that they need."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.shapes import Shape
from benchmarks.shapes import state_flops as global_vectors
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models._self_attention import GlobalVectors
from itm_fast.models.hgan import HierarchicalAlignment
from itm_fast.models.tshsr import TwoStreamReasoning
from itm_fast.testing import hgan, tshsr

MODELS = ("hgan", "tshsr")
CONTEXTS, STEPS = (4, 1), 3  # TSHSR's context nodes and steps of reasoning
GRAPHS, GRANULARITIES = 2, (1, 4, 16)  # HGAN's feature graphs and groups of channels


def build(model: str, shape: Shape, device: str) -> tuple[GlobalVectors, Callable[..., Tensor]]:
    """The scorer, and the loop over its weights."""
    whole = WORKLOADS[shape.workload]
    if model == "hgan":
        scorer: GlobalVectors = HierarchicalAlignment(whole.dim).to(device)
    else:
        scorer = TwoStreamReasoning(whole.dim, whole.similarity, CONTEXTS, STEPS).to(device)
    return scorer, loop_of(model, scorer)


def loop_of(model: str, scorer: GlobalVectors) -> Callable[..., Tensor]:
    """The loop over a scorer's weights as a function of image, padded captions and their lengths."""
    state, loop = scorer.state_dict(keep_vars=True), hgan.loop if model == "hgan" else tshsr.loop
    return lambda *args: loop(state, *args, training=scorer.training)


def needed_flops(model: str, shape: Shape) -> float:
    """Operations that the pairs of a block need, multiply-add = 2.

    HGAN: the affinity once, SCAN's cosines of both directions from the Gram form, and the same of global vectors with
    locals. TSHSR: the affinity once, for both streams the attended vectors, W (P - t)^2, the context nodes, and SGR
    with W_q^T W_k folded and its last step at node 0 only.
    """
    whole = WORKLOADS[shape.workload]
    R, D, S, total = whole.regions, whole.dim, whole.similarity, 0.0
    for L in shape.lengths:
        total += 2 * R * L * D
        if model == "hgan":
            total += 2 * R * L * (R + L) + 8 * R * L + 2 * (R + L) * D + 2 * (R * R + L * L) + 2 * D
            continue
        total += 2 * D * S
        for queries, contexts in ((L, R), (R, L)):
            total += 2 * queries * contexts * (D + contexts) + 2 * queries * D * S
            rows, n = queries, queries + 1 + sum(CONTEXTS)
            for count in CONTEXTS:
                total += 4 * rows * count * S
                rows = count
            total += (STEPS - 1) * (4 * n * S * S + 4 * n * n * S) + 4 * S * S + 4 * n * S
    return total * shape.images


def state_flops(model: str, shape: Shape) -> float:
    """Operations of a block that depend on one image or one caption alone: the global vectors, and HGAN's feature
    graphs, W_q^T W_k folded, and MFAR."""
    total = global_vectors(model, shape)
    if model == "hgan":
        whole = WORKLOADS[shape.workload]
        for n in [whole.regions] * shape.images + shape.lengths:
            total += GRAPHS * (4 * n * whole.dim**2 + 4 * n * n * whole.dim)
            total += sum(2 * (n + 2) * whole.dim**2 / c for c in GRANULARITIES)
    return total
