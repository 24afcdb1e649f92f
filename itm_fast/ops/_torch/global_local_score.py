"""`global_local_score` in batched PyTorch: equation (4) of `ops/global_local_score.py`, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..._checks import work_dtype
from ...packing import bounds, runs, spans
from .. import _attention, _recompute
from .._declare import empty
from ._attention import attended_norm

COPIES = 5  # temporaries [C, L, b] of a block that exist at once in the forward pass


def forward(vector: Tensor, words: Tensor, *rest) -> Tensor:
    score = empty("global_local_score", vector, words, *rest)
    return _recompute.forward(_cut(False, vector, words, *rest), (vector, words), score)


def backward(grad: Tensor, needs: list[bool], vector: Tensor, words: Tensor, *rest) -> list[Tensor]:
    return _recompute.backward(_cut(True, vector, words, *rest), (vector, words), needs, grad)


def _cut(backward: bool, vector: Tensor, words: Tensor, cu_seqlens: Tensor, scale: float) -> Iterator[_recompute.Block]:
    edge = bounds(cu_seqlens, words.shape[0], "global_local_score")
    entries = _recompute.tile_bytes(vector.device, backward) // (COPIES * work_dtype(vector).itemsize)
    for run in runs(edge, vector.device, _recompute.MIN_QUERIES):
        for images in spans(len(vector), max(1, entries // (run.length * run.size))):
            yield _recompute.Block(((images,), (run.rows,)), (images, run.captions), partial(_score, run.length, scale))


def _score(length: int, scale: float, vector: Tensor, words: Tensor) -> Tensor:
    """A block: vectors [b, D], captions of one length [C * L, D] -> [b, C]."""
    work = work_dtype(vector)
    vector, words = vector.to(work), words.to(work)
    caption = words.view(-1, length, words.shape[1])
    product = (words @ vector.t()).view(-1, length, len(vector))  # [C, L, b]
    length_g, length_t = torch.linalg.vector_norm(vector, dim=1), torch.linalg.vector_norm(caption, dim=2)
    cosine = product / (length_t[:, :, None] * length_g).clamp_min(_attention.EPS)
    alpha = (scale * cosine).softmax(1)
    attended = attended_norm(alpha, caption @ caption.transpose(1, 2), caption)
    return ((alpha * product).sum(1) / (length_g * attended).clamp_min(_attention.EPS)).t()
