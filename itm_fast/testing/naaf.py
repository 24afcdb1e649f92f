"""NAAF's published scoring loop (Zhang et al., CVPR 2022): one caption an iteration, all images at once.

The same PyTorch operations in the same order as the authors' code, copies and `repeat` included, so that it is both the
oracle of the tests and an honest baseline of the benchmarks. It differs where that code is at fault: captions of one
word keep their axis, and one in which no region passes the threshold has no gradient. Thresholds are held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import l1norm, l2norm


def loop(
    state: object,
    image: Tensor,
    caption: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    threshold: float = 0.0,
    lambda_softmax: float = 20.0,
    intra_lambda: float = 5.0,
    training: bool = False,
) -> Tensor:
    """Score every image against every caption as the authors' code does.

    Args:
        state: not used: the scorer has no parameters.
        image: [I, R, D], unit rows.
        caption: [T, W, D], padded.
        lengths: T tokens per caption.
        threshold: `thres` in training, else `thres_safe`.
        lambda_softmax: inverse temperature of both attentions.
        intra_lambda: inverse temperature of the mean over similar words.
        training: the function that trains, without its mining.

    Returns:
        Scores, [I, T].

    >>> loop({}, torch.ones(2, 3, 4), torch.ones(5, 6, 4), [6, 2, 3, 4, 5]).shape
    torch.Size([2, 5])
    """
    scores = []
    images, regions = image.shape[:2]
    for t in range(caption.size(0)):
        n = int(lengths[t])
        own = caption[t, :n, :].unsqueeze(0).contiguous()
        words = own.repeat(images, 1, 1)
        affinity = torch.bmm(words, torch.transpose(image, 1, 2))  # [I, W, R]
        turned = torch.transpose(affinity, 1, 2).contiguous()
        above = (affinity - torch.ones_like(affinity) * threshold).view(images * n, regions)
        largest = torch.max(above, 1)[0].unsqueeze(-1)
        if training:
            unmatched = largest.lt(0).to(image.dtype)
        else:
            near = F.softmax(torch.bmm(own, torch.transpose(own, 1, 2)).view(n, n) * intra_lambda, dim=1)
            smooth = torch.bmm(near.repeat(images, 1, 1), largest.reshape(images, n).unsqueeze(-1))
            unmatched = smooth.reshape(images * n, 1).lt(0).to(image.dtype)
        negative = (largest * unmatched).view(images, n)
        weight = l1norm(torch.exp(above.masked_fill(above.le(0), -1e9) * lambda_softmax), 1).view(images, n, regions)
        attended = torch.bmm(weight, image)
        length = torch.linalg.vector_norm(attended, 2, 2)
        positive = torch.sum(words * attended, 2) / length.clamp(min=1e-8)
        turned = torch.transpose(l2norm(F.leaky_relu(turned, 0.1), 2), 1, 2).contiguous()
        alpha = F.softmax(turned.view(images * n, regions) * lambda_softmax, dim=1).view(images, n, regions)
        relevance = affinity.mul(alpha).sum(-1)
        scores.append((negative + positive + relevance).mean(dim=1, keepdim=True))
    return torch.cat(scores, 1)
