"""Identical captions are encoded and scored once, so that their scores have the same bits in every backend."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def first_of_equals(rows: NDArray, edges: NDArray[np.integer]) -> NDArray[np.int64]:
    """For each caption the index of the first one with the same bytes: its own index if it is the first.

    Args:
        rows: [N, ...] word ids or embeddings, captions one after another.
        edges: [T + 1]; caption t is rows[edges[t] : edges[t + 1]].

    Returns:
        int64 [T].

    >>> first_of_equals(np.array([1, 7, 2, 1, 2, 1, 7, 2]), np.array([0, 3, 5, 8]))
    array([0, 1, 0])
    """
    rows = np.ascontiguousarray(rows)
    seen: dict[bytes, int] = {}
    first = np.empty(len(edges) - 1, np.int64)
    for t, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        # Digests are compared, as keys of bytes would hold the embeddings of all captions a second time.
        first[t] = seen.setdefault(hashlib.blake2b(rows[start:stop].data, digest_size=16).digest(), t)
    return first


def first_of_equal_embeddings(words: Tensor, cu_seqlens: Tensor) -> NDArray[np.int64]:
    """`first_of_equals` of packed word embeddings [N, D] with bounds [T + 1]."""
    import torch

    raw = words.detach().cpu().contiguous().view(torch.uint8)
    return first_of_equals(raw.numpy(), cu_seqlens.cpu().numpy())


def columns(first: NDArray[np.int64], lengths: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct captions in the order of scoring, longest first, and the column of each caption's score.

    Args:
        first: [T] as `first_of_equals` gives it.
        lengths: [T] words per caption.

    Returns:
        order: the captions to score; column [T]: for each caption, the position in `order` of the one equal to it.

    >>> columns(np.array([0, 1, 0]), np.array([2, 3, 2]))
    (array([1, 0]), array([1, 0, 1]))
    """
    distinct = np.flatnonzero(first == np.arange(len(first)))
    order = distinct[np.argsort(-lengths[distinct], kind="stable")]
    column = np.empty(len(first), np.int64)
    column[order] = np.arange(len(order))
    return order, column[first]
