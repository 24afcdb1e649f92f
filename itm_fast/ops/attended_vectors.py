"""What every query attends to: the attended vectors of all images and captions, with queries of each pair's own.

For one pair it equals this program (t2i; for i2t swap `regions` and `words`), where queries q are the words unless the
pair has its own, values x the regions unless others are given, and scale a number or one for each query:

    P = (scale * affinity_norm(regions @ q.T, dim=1)).softmax(0).T @ x

Models that refine queries step by step (IMRAM), weigh their channels (RCAR: q times the weights) or fuse them with what
they attend to (CAMP, GSMN) are made of it. A linear map of P is the attended vector of mapped values, W P = sum alpha
(W x), which is computed once per context instead of once per pair.

Forward:

    a_ij  = v_i . q_j,   a' = the affinity norm over a pair's queries j                         (1)
    alpha = softmax over the contexts i of c_j a'_ij                                            (2)
    P_j   = sum over i of alpha_ij x_i                                                          (3)

Backward, with l_ij = c_j a'_ij:

    d x_i = sum alpha_ij dP_j,   d alpha_ij = dP_j . x_i                                        (4)
    d l   = alpha (d alpha - sum over i of alpha d alpha),   d c_j = sum over i of d l_ij a'_ij (5)
    d a follows from c d l through the norm,   d v_i = sum da_ij q_j,   d q_j = sum da_ij v_i   (6)

Saved for backward: the inputs, and in `torch`, of a call with few pairs, what autograd records. Everything else per
pair is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Arguments, dense
from .._names import Backend, Direction, Norm
from ..packing import bounds
from . import _attention, _draws
from ._declare import Choice, Floats, Given, Integers, Result
from ._kept import Recording
from ._register import Op

OFFERED = ("triton", "cpu", "torch", "reference")


def reference(
    image: Tensor,
    words: Tensor,
    queries: Tensor,
    values: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None,
    direction: str,
    affinity_norm: str,
) -> Tensor:
    """(1) to (3), pair by pair; padding regions give rows of zeros."""
    op = "attended_vectors"
    edge, (I, R, _), N = bounds(cu_seqlens, len(words), op), image.shape, len(words)
    T, t2i = len(edge) - 1, direction == "t2i"
    rows = []
    for i, row in enumerate(_attention.pairs(image, words, edge, region_lengths, op)):
        found = []
        for t, (regions, caption) in enumerate(row):
            n, own = len(regions), slice(edge[t], edge[t + 1])
            if t2i:
                context, at, x = regions, own, values[i * R : i * R + n]
            else:
                first = 0 if queries.shape[1] == R else t * R
                context, at, x = caption, slice(first, first + n), values[own]
            query = queries[min(i, len(queries) - 1), at]
            place = at if t2i else slice(t * R, t * R + n)
            c = scale if scale.numel() == 1 else scale[min(i, len(scale) - 1), place][None]
            a = _attention.affinity_norm(context @ query.t(), affinity_norm, 1)
            attended = (c * a).softmax(0).t() @ x
            found.append(attended if t2i else torch.cat([attended, attended.new_zeros(R - n, x.shape[1])]))
        if found:
            rows.append(torch.cat(found) if t2i else torch.stack(found))
    if rows:
        return torch.stack(rows)
    size = {"I": I, "T": T, "R": R, "N": N, "S": values.shape[1]}
    total = image.sum() + words.sum() + queries.sum() + values.sum() + scale.sum()
    return total * image.new_zeros(_shape(size, {"direction": direction}))


def _shape(size: dict[str, int], given: Given) -> tuple[int, ...]:
    return tuple(size[letter] for letter in ("INS" if given["direction"] == "t2i" else "ITRS"))


def _refuse(size: dict[str, int], given: Given) -> str | None:
    t2i = given["direction"] == "t2i"
    I, R, T, N, B, Q, M, C, P = (size[letter] for letter in "IRTNBQMCP")
    pairs, alone = (N, N) if t2i else (T * R, R)
    if (B, Q) not in [(I, pairs), (1, alone) if t2i else (I, alone)]:
        said = "[I, N, D]" if t2i else "[I, T, R, D]"
        return f"queries must be {said} with I = {I}, R = {R}, T = {T} and N = {N}, got {B} x {Q} rows"
    if (I * R if t2i else N) != M:
        said = "[I, R, S], as the regions" if t2i else "[N, S], as the words"
        return f"values must be {said}, got {M} rows"
    if (C, P) not in [(1, 1), (I, pairs)]:
        said = "[I, N]" if t2i else "[I, T, R]"
        return f"scale must be a number or {said}, got {C} x {P}"
    return None


def _own_example(size: _draws.Size, draw: _draws.Draw) -> list[Tensor]:
    """Queries of each pair's own, and other values than the regions."""
    image, words, edge = _draws.attention(size, draw)
    queries = words + draw(len(image), *words.shape) / words.shape[1] ** 0.5
    return [image, words, edge, queries, draw(*image.shape[:2], size.similarity)]


def _recorded(size: dict[str, int], direction: str | None) -> int:
    """Numbers that autograd records in batched PyTorch: some affinities, and a row of D and of S for each query."""
    rows = size["N"] if direction == "t2i" else size["T"] * size["R"]
    return size["I"] * (5 * size["R"] * size["N"] + rows * (size["D"] + size["S"]))


_op = Op(
    "attended_vectors",
    [
        Floats("image", "I R D"),
        Floats("words", "N D"),
        Floats("queries", "B Q D"),
        Floats("values", "M S"),
        Floats("scale", "C P"),
        Integers("cu_seqlens", "T+1"),
        Integers("region_lengths", "I", optional=True),
        Choice("direction", _attention.DIRECTIONS, "Direction"),
        Choice("affinity_norm", _attention.NORMS, "Norm"),
    ],
    [Result("attended", _shape)],
    offered=OFFERED,
    reference=reference,
    examples=[lambda size, draw: _draws.attention(size, draw), _own_example],
    keeping={"torch": Recording("attended_vectors", _recorded)},
    refuse=_refuse,
    backward="torch",
)


@_op.public
def attended_vectors(
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    queries: Tensor | None = None,
    values: Tensor | None = None,
    *,
    direction: Direction = "t2i",
    affinity_norm: Norm = "clipped_l2norm",
    scale: float | Tensor = 9.0,
    region_lengths: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The attended vector of every query of every image and caption.

    The result has I x N x S elements, so take large sets block by block.

    Args:
        image: [I, R, D] region features, float64, float32, float16 or bfloat16.
        words: [N, D] packed word features, same dtype and device; see `itm_fast.pack`.
        cu_seqlens: [T + 1] int32 or int64: caption t is `words[cu_seqlens[t]:cu_seqlens[t + 1]]`.
        queries: [B, Q, D] queries that differ for each pair: [I, N, D] or, for i2t, [I, T, R, D]. None: the words or,
            for i2t, the regions.
        values: [M, S] vectors that the attention weights sum: [I, R, S] or, for i2t, [N, S]. None: the vectors that
            are attended to.
        direction: "t2i" (words attend to regions) or "i2t" (regions attend to words).
        affinity_norm: how affinities are normalised over the queries: softmax, l2norm, clipped_l2norm, l1norm,
            clipped_l1norm, clipped or none ("clipped" is LeakyReLU with slope 0.1).
        scale: [C, P] inverse temperatures of the attention's softmax: a number, or a tensor with one for each query,
            [I, N] or, for i2t, [I, T, R]; 0 gives equal weights.
        region_lengths: [I] int32 or int64 regions of each image, from 1 to R; None means R for all.
        backend: "triton", "cpu", "torch" or "reference"; None lets itm_fast choose.

    Returns:
        t2i: [I, N, S], one vector per image and word. i2t: [I, T, R, S], one per caption and region; those of padding
        regions are zero. S is D without `values`. Dtype of `image` (under autocast, autocast's).

    Raises:
        ValueError: a shape, a length or an option is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: the backend asked for cannot run here; the message says why.

    >>> import torch, itm_fast
    >>> image, (words, cu_seqlens) = torch.randn(2, 36, 64), itm_fast.pack(torch.randn(3, 12, 64), [12, 5, 8])
    >>> attended = itm_fast.attended_vectors(image, words, cu_seqlens)
    >>> again = itm_fast.attended_vectors(image, words, cu_seqlens, words + attended)    # queries of each pair's own
    >>> again.shape
    torch.Size([2, 25, 64])
    """
    t2i = direction == "t2i"
    if dense(image) and dense(words) and image.dim() == 3 and words.dim() == 2:  # else they are refused below
        contexts = image if t2i else words
        if values is None:
            values = contexts
        if queries is None:
            queries = words[None] if t2i else image
        if t2i and dense(values) and values.dim() == 3:
            values = values.flatten(0, 1)
        if not t2i and dense(queries) and queries.dim() == 4:
            queries = queries.flatten(1, 2)
        if not isinstance(scale, Tensor):
            Arguments("attended_vectors").number("scale", scale)
            scale = image.new_full((1, 1), float(scale))
        elif not t2i and dense(scale) and scale.dim() == 3:
            scale = scale.flatten(1)
    return _op(
        image=image, words=words, queries=queries, values=values, scale=scale, cu_seqlens=cu_seqlens,
        region_lengths=region_lengths, direction=direction, affinity_norm=affinity_norm, backend=backend,
    )  # fmt: skip
