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

A process that has a part of a batch's images has their scores [I, T] with all its captions. With p(i) the caption of
image i (1) becomes

    loss = sum_i max_{c != p(i)} [m + S_ic - S_ip(i)]_+  +  sum_i max_{j != i} [m + S_jp(i) - S_ip(i)]_+     (3)

where only the first sum sees all of its negatives. Without `both` it is the loss, and the losses of all parts add up to
the first sum of the whole batch.

Saved for backward: the scores.
"""

from __future__ import annotations

from torch import Tensor

from .._names import Backend
from ._declare import Flag, Floats, Given, Integers, Number, Result
from ._negatives import columns, positives
from ._register import Op

OFFERED = ("torch", "reference")


def reference(
    score: Tensor, positive: Tensor | None, image_ids: Tensor | None, margin: float, hardest: bool, both: bool
) -> Tensor:
    """(3), entry by entry."""
    masked = positives(score, positive, image_ids)
    square = columns(score, positive)
    match = square.diagonal()
    cost_t = (margin + score - match[:, None]).clamp_min(0).masked_fill(masked, 0)
    cost_v = (margin + square - match[None, :]).clamp_min(0).masked_fill(columns(masked, positive), 0)
    if hardest and score.numel():
        cost_t, cost_v = cost_t.max(1).values, cost_v.max(0).values
    return cost_t.sum() + cost_v.sum() if both else cost_t.sum()


def _refuse(size: dict[str, int], given: Given) -> str | None:
    if given["positive"] is None and size["I"] != size["T"]:
        return f"score must be [B, B], got [{size['I']}, {size['T']}]; for a part of a batch's images give positive"
    return None


_op = Op(
    "hardest_negative_loss",
    [
        Floats("score", "I T"),
        Integers("positive", "I", optional=True),
        Integers("image_ids", "T", optional=True),
        Number("margin"),
        Flag("hardest"),
        Flag("both"),
    ],
    [Result("loss", "")],
    offered=OFFERED,
    reference=reference,
    examples=[lambda size, draw: [draw(5, 5)]],
    refuse=_refuse,
    widens=True,
)


@_op.public
def hardest_negative_loss(
    score: Tensor,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    image_ids: Tensor | None = None,
    positive: Tensor | None = None,
    both: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """Triplet ranking loss of a batch, with its hardest negatives.

    Args:
        score: [I, T], image i with caption c: of a whole batch, square with the matching pairs on the diagonal, or,
            with `positive`, of some of its images with all its captions. Autocast converts it to float32.
        margin: by how much a match must beat its negatives. torch.compile makes a graph for each value, by default of
            at most 8 (`torch._dynamo.config.recompile_limit`); for more it warns and runs the function uncompiled, or
            fails with `fullgraph=True`. A margin that is a tensor breaks the graph, and fails with `fullgraph=True`.
        hardest: True: only the hardest negative of each row and column counts, as with the published code's
            `max_violation`. False: all negatives count.
        image_ids: [T] int32 or int64, the image of each caption; an image's other captions are not its negatives. None,
            as published: every pair that does not match is a negative, even another caption of the same image.
        positive: [I] int32 or int64, the caption of each image, from 0 to T - 1; no two alike. None: caption i.
        both: False: only images have negatives, the hardest caption of each (the first sum of the loss); over the
            blocks [I, T] of a batch's images such losses add up to that of the whole batch. True: the captions that
            match one of these images have theirs among these images too.
        backend: "torch" or "reference"; None lets itm_fast choose.

    Returns:
        A scalar, summed over the batch.

    Raises:
        ValueError: the score is not square and `positive` is not given, or a tensor has another length.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> itm_fast.hardest_negative_loss(torch.tensor([[0.9, 0.1], [0.8, 0.5]]))
    tensor(0.6000)

    The second image of three, and the third one, with all three captions:

    >>> itm_fast.hardest_negative_loss(torch.eye(3)[1:] / 10, positive=torch.tensor([1, 2]), both=False)
    tensor(0.2000)
    """
    return _op(
        score=score,
        positive=positive,
        image_ids=image_ids,
        margin=margin,
        hardest=hardest,
        both=both,
        backend=backend,
    )
