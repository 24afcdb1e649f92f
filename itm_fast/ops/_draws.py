"""Random arguments for the ops' examples, in float64.

An example is a function of a `Size` and of `draw(*shape)`, which returns normally distributed numbers. It returns an
op's arguments in the order of its public function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..packing import pack


class Size(NamedTuple):
    """Sizes of an example: images, words of each caption, regions, D, S and K."""

    images: int
    lengths: tuple[int, ...]
    regions: int
    dim: int
    similarity: int
    steps: int


Draw = Callable[..., Tensor]
Example = Callable[[Size, Draw], list[Any]]


def inputs(
    I: int,
    lengths: Sequence[int],
    R: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random features of unit length, as the encoders return them.

    Args:
        I: images.
        lengths: words of each caption.
        R: regions.
        D: embedding.
        dtype: of the features; they are drawn in float64 and rounded, so all dtypes see the same data.
        device: where they lie.
        requires_grad: of image and words.
        seed: of the random generator.

    Returns:
        image [I, R, D], words [N, D], cu_seqlens [T + 1] int32.

    >>> from itm_fast.testing import inputs
    >>> [list(x.shape) for x in inputs(2, [3, 5], 4, 8)]
    [[2, 4, 8], [8, 8], [3]]
    """
    generator = torch.Generator().manual_seed(seed)
    # Vectors that all rows share keep affinities away from zero, as in trained models.
    image = torch.randn(I, R, D, generator=generator, dtype=torch.float64) + torch.randn(
        1, 1, D, generator=generator, dtype=torch.float64
    )
    caption = torch.randn(len(lengths), max(lengths, default=1), D, generator=generator, dtype=torch.float64)
    caption = caption + torch.randn(1, 1, D, generator=generator, dtype=torch.float64)
    words, cu_seqlens = pack(torch.nn.functional.normalize(caption, dim=-1), lengths)
    image = torch.nn.functional.normalize(image, dim=-1).to(device=device, dtype=dtype)
    words = words.to(device=device, dtype=dtype)
    return image.requires_grad_(requires_grad), words.requires_grad_(requires_grad), cu_seqlens.to(device)


def attention(size: Size, draw: Draw) -> list[Tensor]:
    """image, words and cu_seqlens."""
    return list(inputs(size.images, size.lengths, size.regions, size.dim, dtype=torch.float64))


def apart(size: Size, draw: Draw) -> list[Tensor]:
    """image, words and cu_seqlens of affinities 0.2 to 0.6 of each word with five regions, and 0 with all others.

    At scale 4 and threshold 0.35, each of `_attention.WEIGHTS` keeps other regions where R is 36, and which ones does
    not change when products are rounded, be it to bfloat16. R is at least 7, and D larger than R.
    """
    R, D, N = size.regions, size.dim, sum(size.lengths)
    axes = torch.linalg.qr(draw(D, D)).Q.t()
    image = torch.nn.functional.normalize(axes[:R] + 0.02 * unit(draw, size.images, R, D), dim=-1)
    word = torch.arange(N)
    share = torch.zeros(N, D, dtype=axes.dtype)
    for step, affinity in ((0, 0.4), (1, 0.2), (3, 0.6), (4, 0.3), (5, 0.5)):
        share[word, (word + step) % R] = affinity
    share[:, R:] = 0.3 * unit(draw, N, D - R)
    edge = torch.tensor([0, *size.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return [image, share @ axes, edge]


def standing_out(size: Size, draw: Draw) -> list[Tensor]:
    """image, words and cu_seqlens, where the first query of each pair has the largest similarity.

    At scale 9 and the published sizes it is above 0.5 with every norm, and those of the others are below 0.35: what
    rounding changes is far less.
    """
    edge = torch.tensor([0, *size.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    image, words = unit(draw, size.images, size.regions, size.dim), unit(draw, sum(size.lengths), size.dim)
    shared = unit(draw, size.dim)  # by all, most of all by first regions and words
    image, words = image + 0.25 * shared, words + 0.25 * shared
    image[:, 0] += 1.75 * shared
    words[edge[:-1].long()] += 1.75 * shared
    return [torch.nn.functional.normalize(x, dim=-1) for x in (image, words)] + [edge]


def linear(size: Size, draw: Draw) -> list[Tensor]:
    """weight [S, D] and bias [S] of a similarity projection."""
    # Its inputs, squared differences of unit vectors, are about 1 / D.
    return [size.dim**0.5 * draw(size.similarity, size.dim), draw(size.similarity)]


def unit(draw: Draw, *shape: int) -> Tensor:
    """Vectors of length 1 along the last dimension."""
    return torch.nn.functional.normalize(draw(*shape), dim=-1)


def global_vectors(size: Size, draw: Draw) -> list[Tensor]:
    """image_global and caption_global."""
    return [unit(draw, n, size.dim) for n in (size.images, len(size.lengths))]


def node_inputs(size: Size, draw: Draw) -> list[Tensor]:
    """The arguments of `similarity_nodes`."""
    (image, words, cu_seqlens), overall = attention(size, draw), global_vectors(size, draw)
    return [image, overall[0], words, overall[1], cu_seqlens, *linear(size, draw), *linear(size, draw)]


def nodes(size: Size, draw: Draw) -> list[Tensor]:
    """Nodes of all pairs, and their bounds."""
    bounds = torch.tensor([0, *(n + 1 for n in size.lengths)]).cumsum(0).int()
    return [unit(draw, size.images, int(bounds[-1]), size.similarity), bounds]


def graph_weights(size: Size, draw: Draw) -> list[Tensor]:
    """The weights and biases of `similarity_graph`."""
    # Large query and key weights: with small ones the attention is uniform, and mistakes in it would not show.
    K, S = size.steps, size.similarity
    scaled = [(scale * draw(K, S, S) / S**0.5, draw(K, S) / S**0.5) for scale in (4.0, 4.0, 1.0)]
    return [x for pair in scaled for x in pair]


def filter_weights(size: Size, draw: Draw) -> list[Tensor]:
    """The parameters and statistics of `similarity_filter`."""
    one = torch.ones(1, dtype=torch.float64)
    return [3 * draw(size.similarity), 0.1 * one, 2 * one, 0.3 * one, 0.2 * one, 0.5 * one]


def score_weights(size: Size, draw: Draw) -> list[Tensor]:
    """score_weight and score_bias."""
    return [draw(size.similarity), draw(1)]
