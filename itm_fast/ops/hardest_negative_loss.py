"""Ranking loss over a batch's score matrix with the hardest negatives (VSE++; SGRAF, equation 10).

For score S [B, B] with the matching pairs on the diagonal it equals this program:

    cost_t = (margin + S - S.diag()[:, None]).clamp(0).fill_diagonal_(0)
    cost_v = (margin + S - S.diag()[None, :]).clamp(0).fill_diagonal_(0)
    loss = cost_t.amax(1).sum() + cost_v.amax(0).sum()

Forward, over the negatives c != i (and, with image ids, captions c whose image is not i's):

    loss = sum_i max_c [m + S_ic - S_ii]_+  +  sum_c max_i [m + S_ic - S_cc]_+                  (1)

or, without `hardest`, with sums over all negatives in place of both maxima. It is a sum over the batch, not a mean, as
published.

Backward, for each row i and its hardest negative h (without `hardest`: each of its negatives h) whose cost is positive,
with g the loss's gradient, and the same for each column:

    d S_ih += g,   d S_ii -= g                                                                  (2)

Saved for backward: the scores.
"""

from __future__ import annotations

from torch import Tensor

from ._declare import Flag, Floats, Integers, Number, Result
from ._negatives import positives
from ._register import Op

OFFERED = ("torch", "reference")


def reference(score: Tensor, image_ids: Tensor | None, margin: float, hardest: bool) -> Tensor:
    """(1), entry by entry."""
    match = score.diagonal()
    masked = positives(score, image_ids)
    cost_t = (margin + score - match[:, None]).clamp_min(0).masked_fill(masked, 0)
    cost_v = (margin + score - match[None, :]).clamp_min(0).masked_fill(masked, 0)
    if hardest and len(score):
        return cost_t.max(1).values.sum() + cost_v.max(0).values.sum()
    return cost_t.sum() + cost_v.sum()


_op = Op(
    "hardest_negative_loss",
    [
        Floats("score", "B B"),
        Integers("image_ids", "B", optional=True),
        Number("margin"),
        Flag("hardest"),
    ],
    [Result("loss", "")],
    offered=OFFERED,
    reference=reference,
    examples=[lambda size, draw: [draw(5, 5)]],
    widens=True,
)


@_op.public
def hardest_negative_loss(
    score: Tensor,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    image_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Triplet ranking loss of a batch, with its hardest negatives.

    Args:
        score: [B, B], image i with caption c; matching pairs on the diagonal. Autocast converts it to float32.
        margin: by how much a match must beat its negatives.
        hardest: True: only the hardest negative of each row and column counts, as with the published code's
            `max_violation`. False: all negatives count.
        image_ids: [B] int32 or int64; pairs with equal ids are not negatives. None, as published: every pair off the
            diagonal is a negative, even another caption of the same image.
        backend: "torch" or "reference"; None lets itm_fast choose.

    Returns:
        A scalar, summed over the batch.

    Raises:
        ValueError: the score is not square, or image_ids has another length.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> itm_fast.hardest_negative_loss(torch.tensor([[0.9, 0.1], [0.8, 0.5]]))
    tensor(0.6000)
    """
    return _op(score=score, image_ids=image_ids, margin=margin, hardest=hardest, backend=backend)
