"""SHAN for the benchmarks of whole models: its scorers, its loop, and the operations that they need."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.shapes import Shape
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models.shan import ALIGNMENTS, EncoderSimilarity
from itm_fast.testing import shan

# name -> alignment and gate
MODELS = {
    "shan": ("full", "scalar"),
    "shan-t2i": ("t2i", "scalar"),
    "shan-i2t": ("i2t", "scalar"),
    "shan-vector": ("full", "vector"),
}


def build(model: str, shape: Shape, device: str) -> tuple[EncoderSimilarity, Callable[..., Tensor]]:
    """The scorer, and the loop over its weights."""
    alignment, gate = MODELS[model]
    scorer = EncoderSimilarity(WORKLOADS[shape.workload].dim, alignment, gate=gate).to(device)
    return scorer, loop_of(model, scorer)


def loop_of(model: str, scorer: EncoderSimilarity) -> Callable[..., Tensor]:
    """The loop over a scorer's weights as a function of image, padded captions and their lengths."""
    state, direction = scorer.state_dict(keep_vars=True), ALIGNMENTS[MODELS[model][0]]
    return lambda *args: shan.loop(state, *args, direction=direction)


def needed_flops(model: str, shape: Shape) -> float:
    """Operations that the pairs of a block need, multiply-add = 2, given the projections of their rows.

    Scalar gates: the affinities, V T^T, and for each side the quadratic forms of what is attended to and a dozen
    products of [R, L] with a vector. Vector gates: the affinities, for each side what is attended to and what that
    adds to the gate, and six passes over these rows.
    """
    whole = WORKLOADS[shape.workload]
    alignment, gate = MODELS[model]
    R, D, total = whole.regions, whole.dim, 0.0
    sides = {"full": ("image", "caption"), "i2t": ("image",), "t2i": ("caption",)}[alignment]
    for L in shape.lengths:
        total += 2 * R * L * D * (2 if gate == "scalar" else 1)
        for side in sides:
            rows, others = (R, L) if side == "image" else (L, R)
            if gate == "scalar":
                total += 2 * rows * others * others + 12 * rows * others + 2 * (rows * rows + 2 * others * others)
            else:
                total += 2 * rows * others * 2 * D + 12 * rows * D + 4 * others * D
    return total * shape.images


def state_flops(model: str, shape: Shape) -> float:
    """Operations of a block that depend on one row alone: its key and, with vector gates, its two parts of them."""
    D = WORKLOADS[shape.workload].dim
    rows = WORKLOADS[shape.workload].regions * shape.images + sum(shape.lengths)
    products = 1 if MODELS[model][1] == "scalar" else 3 if MODELS[model][0] == "full" else 2
    return 2.0 * D * D * products * rows
