"""The relatives of SCAN and SGRAF for the benchmarks of whole models: scorers, loops, and the operations they need.

All have the options of their recipe for COCO. MaxSim and the dual encoder have no published loop over captions: theirs
is the plain one, a caption an iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from benchmarks.shapes import state_flops as global_vectors
from itm_fast.evaluation.workloads import WORKLOADS
from itm_fast.models._building import model_class
from itm_fast.models.naaf import NegativeAware, _Seen
from itm_fast.testing import bfan, chan, cmcan, imram, naaf, rcar
from itm_fast.testing.scan import l2norm
from itm_fast.training import options

MODELS = ("imram", "rcar", "cmcan", "bfan", "chan", "naaf", "maxsim", "dual")
OPTIONS = {  # those of the loops, by the scorers' attributes
    "imram": ("model_mode", "iteration_step", "lambda_softmax", "no_IMRAM_norm"),
    "rcar": ("attn_type", "self_regulator", "step", "smooth"),
}


def build(model: str, shape: Shape, device: str) -> tuple[Any, Callable[..., Tensor]]:
    """The scorer, and the loop over its weights."""
    whole = WORKLOADS[shape.workload]
    sizes = {"embed_size": whole.dim, **({"sim_dim": whole.similarity} if model in ("rcar", "cmcan") else {})}
    opt = options(model, recipe="coco", **sizes)
    scorer = model_class(opt).similarity(opt).to(device).train()
    return scorer, loop_of(model, scorer)


def loop_of(model: str, scorer: Any) -> Callable[..., Tensor]:
    """The loop over a scorer's weights as a function of image, padded captions and their lengths."""
    state = scorer.state_dict(keep_vars=True)
    own = {name: getattr(scorer, name) for name in OPTIONS.get(model, ())}
    loops: dict[str, Callable[..., Tensor]] = {
        "imram": lambda *args: imram.loop(state, *args, **own),
        "rcar": lambda *args: rcar.loop(state, *args, **own, training=scorer.training),
        "cmcan": lambda *args: cmcan.loop(state, *args, training=scorer.training),
        "bfan": lambda *args: bfan.loop(state, *args),
        "chan": lambda *args: chan.loop(state, *args),
        "naaf": lambda *args: _naaf(scorer, *args),
        "maxsim": _maxsim,
        "dual": _dual,
    }
    return loops[model]


def _naaf(scorer: NegativeAware, image: Tensor, caption: Tensor, lengths: Sequence[int]) -> Tensor:
    """NAAF's loop; in training the thresholds follow each caption, as published."""
    own = {"lambda_softmax": scorer.lambda_softmax, "intra_lambda": scorer.intra_lambda}
    if not scorer.training:
        return naaf.loop({}, image, caption, lengths, threshold=scorer.thres_safe, **own)
    columns, seen = [], _Seen()
    for t, n in enumerate(lengths):
        one = naaf.loop({}, image, caption[t : t + 1], [n], threshold=scorer.thres, training=True, **own)
        peak = one.new_zeros(len(image), n)
        for i in (t, int(one.argmin())):  # the two rows that it may read; the published loop has all of them already
            peak[i] = (caption[t, :n] @ image[i].t()).amax(1).detach()
        scorer.mine(seen, t, peak, one[:, 0])
        columns.append(one)
    return torch.cat(columns, 1)


def _maxsim(image: Tensor, caption: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean over a caption's words of the largest affinity with a region."""
    return torch.stack([(image @ caption[t, :n].t()).amax(1).mean(1) for t, n in enumerate(lengths)], 1)


def _dual(image: Tensor, caption: Tensor, lengths: Sequence[int]) -> Tensor:
    """Cosines of the images' mean regions and the captions' mean words."""
    whole = l2norm(image.mean(1), -1)
    return torch.stack([whole @ l2norm(caption[t, :n].mean(0), -1) for t, n in enumerate(lengths)], 1)


def needed_flops(model: str, shape: Shape) -> float:
    """Operations that the pairs of a block need, multiply-add = 2, given what depends on one image or caption.

    Each step of attention needs the affinities V T^T and, where its vectors enter a Linear, these; cosines of attended
    vectors come from the Gram form. Products with similarity vectors, which have S numbers, are counted where they are
    with a matrix.
    """
    whole = WORKLOADS[shape.workload]
    if model == "dual":
        return 2.0 * whole.dim * shape.pairs
    return shape.images * sum(_pair(model, whole.regions, L, whole.dim, whole.similarity) for L in shape.lengths)


def _pair(model: str, R: int, L: int, D: int, S: int) -> float:
    affinity = 2.0 * R * L * D
    t2i, i2t = 2.0 * R * L * R + 4 * R * L, 2.0 * R * L * L + 4 * R * L  # the cosines of each direction
    if model == "bfan":
        return affinity + t2i + i2t
    if model == "naaf":
        return affinity + t2i + 2 * R * L
    if model in ("chan", "maxsim"):
        return affinity
    if model == "imram":  # t2i, three steps; the first one's queries are the words, whose products a caption needs once
        return 3 * (affinity + t2i) + 2 * 2 * affinity + 4.0 * L * D * D
    if model == "rcar":  # t2i, two steps, the regulators of attention between them
        step = 2 * affinity + 2.0 * R * R * L + 2 * L * D * S + 2 * (L + 1) * S * S
        return 2 * step + 2 * L * (2 * S * S + 2 * S * D + S * S / 2)
    # CMCAN: similarity vectors of the pair, its words, its regions and their surroundings
    total = 3 * affinity + 2.0 * R * L * (R + L) + 2 * D * S * (1 + L + 2 * R)
    for n in (L + 1, R + 1):  # its graphs, three steps, the last one at node 0 only
        total += 2 * (4 * n * S * S + 4 * n * n * S) + 4 * S * S + 4 * n * S
    return total


def state_flops(model: str, shape: Shape) -> float:
    """Operations of a block that depend on one image or one caption alone: CMCAN's global vectors, and the products of
    regions and of words with IMRAM's two Linear layers."""
    whole = WORKLOADS[shape.workload]
    if model == "cmcan":
        return global_vectors(model, shape)
    rows = whole.regions * shape.images + sum(shape.lengths)
    return 4.0 * rows * whole.dim**2 if model == "imram" else 0.0
