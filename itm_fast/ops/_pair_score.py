"""What SGRAF's two pair scorers share around their heads: a pair's nodes and its score (section 3.2).

With the global vectors v of the image and t of the caption, the local similarity vectors s_j of
`cross_attention_similarity` (t2i, affinity norm "clipped_l2norm"), and z what the head makes of the nodes X:

    y_g   = W_g (v - t)^2 + b_g,    s_g = y_g / (|y_g| + 1e-8)
    X     = [s_g; s_1; ...; s_L]                                         [L + 1, S]
    score = sigmoid(w_e . z + b_e)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Arguments
from ..packing import bounds
from . import _attention
from .cross_attention_similarity import reference as similarity

NORM = "clipped_l2norm"
INPUTS = (
    "Tensor image, Tensor image_global, Tensor words, Tensor caption_global, Tensor local_weight, Tensor local_bias, "
    "Tensor global_weight, Tensor global_bias"
)
SCORE = "Tensor score_weight, Tensor score_bias"
REST = "Tensor cu_seqlens, Tensor? region_lengths, float scale"


def check(
    op: str,
    inputs: dict[str, Tensor],
    head: dict[str, tuple[Tensor, str]],
    score: dict[str, Tensor],
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> Arguments:
    """Check what both scorers take, in the order of their arguments."""
    check = Arguments(op)
    letters = ("I R D", "I D", "N D", "T D", "S D", "S", "S D", "S")
    check.floats(**{name: (x, shape) for (name, x), shape in zip(inputs.items(), letters, strict=True)})
    check.floats(**head)
    check.floats(**{name: (x, shape) for (name, x), shape in zip(score.items(), ("S", "1"), strict=True)})
    check.integers("cu_seqlens", cu_seqlens, "T+1")
    T = check.size["T"][0]
    if cu_seqlens.shape[0] != T + 1:
        raise ValueError(
            f"{op}: cu_seqlens must be [T+1] with T = {T} as in caption_global, got {list(cu_seqlens.shape)}"
        )
    if region_lengths is not None:
        check.integers("region_lengths", region_lengths, "I")
    check.positive("scale", scale)
    return check


def nodes(
    op: str,
    image: Tensor,
    image_global: Tensor,
    words: Tensor,
    caption_global: Tensor,
    local_weight: Tensor,
    local_bias: Tensor,
    global_weight: Tensor,
    global_bias: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The nodes X of all pairs [I, N + T, S] and their bounds [T + 1]."""
    edge = bounds(cu_seqlens, words.shape[0], op)
    _attention.region_counts(region_lengths, image, op)
    local = similarity(image, words, local_weight, local_bias, cu_seqlens, region_lengths, "t2i", NORM, scale)
    overall = _attention.l2norm((image_global[:, None] - caption_global).square() @ global_weight.t() + global_bias)
    T = len(edge) - 1
    order = [row for t in range(T) for row in (t, *range(T + edge[t], T + edge[t + 1]))]
    packed = torch.cat([overall, local], 1)[:, torch.tensor(order, dtype=torch.int64, device=image.device)]
    return packed, cu_seqlens + torch.arange(T + 1, dtype=cu_seqlens.dtype, device=cu_seqlens.device)


def score(z: Tensor, score_weight: Tensor, score_bias: Tensor) -> Tensor:
    """sigmoid(w_e . z + b_e) of z [I, T, S] -> [I, T]."""
    return (z @ score_weight + score_bias).sigmoid()


def fake(image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor, *_) -> Tensor:
    return image.new_empty(image.shape[0], caption_global.shape[0])
