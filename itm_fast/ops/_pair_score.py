"""What SGRAF's two pair scorers share around their heads: a pair's nodes and its score (section 3.2).

With z what the head makes of the nodes X [L + 1, S] of `similarity_nodes`:

    score = sigmoid(w_e . z + b_e)
"""

from __future__ import annotations

from torch import Tensor

from .._checks import Arguments

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
    """Check what the scorers and `similarity_nodes` take, in the order of their arguments."""
    check = Arguments(op)
    letters = ("I R D", "I D", "N D", "T D", "S D", "S", "S D", "S")
    check.floats(**{name: (x, shape) for (name, x), shape in zip(inputs.items(), letters, strict=True)})
    check.floats(**head)
    check.floats(**{name: (x, shape) for (name, x), shape in zip(score.items(), ("S", "1"))})
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


def score(z: Tensor, score_weight: Tensor, score_bias: Tensor) -> Tensor:
    """sigmoid(w_e . z + b_e) of z [I, T, S] -> [I, T]."""
    return (z @ score_weight + score_bias).sigmoid()


def fake(image: Tensor, image_global: Tensor, words: Tensor, caption_global: Tensor, *_) -> Tensor:
    return image.new_empty(image.shape[0], caption_global.shape[0])
