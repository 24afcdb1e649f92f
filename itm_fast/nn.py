"""Modules over the ops, and `PairScorer`, the interface through which evaluation and training score pairs.

A pair scorer computes once what depends on a single image or caption (its state), and the scores block by block:

    state = scorer.image_state(image, region_lengths)             # tensors [I, ...], the first one `image`
    caption_state = scorer.caption_state(words, cu_seqlens)       # `per_word` tensors [N, ...], then others [T, ...]
    score = scorer.score(state, words, cu_seqlens, caption_state, region_lengths)     # [I, T], for any block of both
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._checks import Arguments, Shape, traced
from ._names import AnyPool, Direction, Norm, Similarity, Weights
from .ops import cross_attention_score, similarity_filter, similarity_graph
from .ops._attention import NEGATIVE, affinity_norm, attention_weights, negative, pooled, similarities
from .packing import bounds, region_counts

State = tuple[Tensor, ...]
IMAGE, WORDS, BOUNDS, COUNTS = map(Shape, ("I R D", "N D", "T+1", "I"))


def xavier_(linear: nn.Linear) -> None:
    """Initialise a Linear as the papers do: weight uniform in +- sqrt(6 / (in + out)), bias zero."""
    bound = math.sqrt(6.0) / math.sqrt(linear.in_features + linear.out_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


@dataclass(frozen=True, eq=False)
class Attention:
    """What a pair scorer attends to in one image and one caption.

    Attributes:
        score: the pair's score, computed from these weights.
        weights: by name. `regions` [W, R]: each word's distribution over the regions; `words` [R, W]: each region's
            over the words; the others are the model's own.
        tokens: the W words, where they are known.
    """

    score: float
    weights: dict[str, Tensor]
    tokens: tuple[str, ...] = ()


class PairScorer(nn.Module):
    """Scores every image with every caption. Subclasses define `score` and, where they have states, both of these."""

    # In training, whether a caption's scores depend on all images of the batch, as by SAF's batch statistics.
    all_images = False
    # In training, whether scores depend on those of other pairs, so that every process scores the whole batch.
    all_pairs = False
    # Whether `image_state` takes the regions' boxes as its third argument: [I, R, 4], as parts of the picture, or None.
    takes_boxes = False
    without_boxes = ""  # what follows for a scorer that takes boxes where there are none, for warnings
    # The names of `forward`'s arguments `image`, `words` and `cu_seqlens` in messages.
    named = ("image", "words", "cu_seqlens")
    per_word = 0  # the first `per_word` tensors of `caption_state` have a row per word, the others a row per caption

    def image_state(self, image: Tensor, region_lengths: Tensor | None = None) -> State:
        """Compute what depends on single images: image [I, R, D] -> tensors [I, ...], the first one `image` itself."""
        return (image,)

    def caption_state(self, words: Tensor, cu_seqlens: Tensor) -> State:
        """Compute what depends on single captions: words [N, D], cu_seqlens [T + 1] -> `per_word` tensors [N, ...],
        then others [T, ...]."""
        return ()

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T] of the images and captions whose states are given."""
        raise NotImplementedError

    def forward(self, image: Tensor, words: Tensor, cu_seqlens: Tensor, region_lengths: Tensor | None = None) -> Tensor:
        """Scores [I, T] of images [I, R, D] and packed captions; `check_inputs` says what it refuses."""
        check_inputs(self, type(self).__name__, image, words, cu_seqlens, region_lengths)
        image_state = self.image_state(image, region_lengths)
        caption_state = self.caption_state(words, cu_seqlens)
        return self.score(image_state, words, cu_seqlens, caption_state, region_lengths)

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """What the scorer, in evaluation mode, attends to in one image [R, D] and one caption [W, D].

        Raises:
            NotImplementedError: it weighs nothing, or cannot tell.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention weights to show")

    def matched(
        self,
        image: Tensor,
        words: Tensor,
        cu_seqlens: Tensor,
        region_lengths: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Scores [B] of image i with caption i, as on the diagonal of `forward`, without the other B (B - 1) pairs.

        In training, statistics over a batch of pairs (SAF's BatchNorm) are over one pair at a time, in their order.

        Args:
            image: [B, R, D].
            words: [N, D] packed words.
            cu_seqlens: [B + 1].
            region_lengths: [B] regions of each image; None means R for all.
            boxes: [B, R, 4] of the regions, for scorers that take them.

        Raises:
            ValueError: there are not as many captions as images, a shape or length is wrong, or the scorer takes no
                boxes and gets some.

        >>> import torch, itm_fast
        >>> words, cu_seqlens = itm_fast.pack(torch.randn(2, 12, 64), [12, 5])
        >>> itm_fast.nn.CrossAttentionScore(pool="mean").matched(torch.randn(2, 36, 64), words, cu_seqlens).shape
        torch.Size([2])
        """
        name = type(self).__name__
        check_inputs(self, f"{name}.matched", image, words, cu_seqlens, region_lengths)
        edge = bounds(cu_seqlens, len(words), f"{name}.matched")
        if len(edge) - 1 != len(image):
            raise ValueError(f"{name}.matched: one caption per image is needed, got {len(image)} and {len(edge) - 1}")
        if boxes is not None and not self.takes_boxes:
            raise ValueError(f"{name}.matched: it takes no boxes, got {list(boxes.shape)}; leave them out")
        of_images = image_state(self, image, region_lengths, boxes)
        caption_state = self.caption_state(words, cu_seqlens)
        per_word, per_caption = caption_state[: self.per_word], caption_state[self.per_word :]
        found = []
        for i, (start, stop) in enumerate(pairwise(edge)):
            one, rows = slice(i, i + 1), slice(start, stop)
            score = self.score(
                tuple(x[one] for x in of_images),
                words[rows],
                cu_seqlens[i : i + 2] - start,
                (*(x[rows] for x in per_word), *(x[one] for x in per_caption)),
                None if region_lengths is None else region_lengths[one],
            )
            found.append(score[0])
        return torch.cat(found) if found else image.new_empty(0)


def check_inputs(
    scorer: PairScorer,
    op: str,
    image: Tensor,
    words: Tensor,
    cu_seqlens: Tensor,
    region_lengths: Tensor | None = None,
) -> None:
    """Raise where `scorer`, called `op` in the message, cannot score images [I, R, D] and packed captions.

    A scorer's own layers see the tensors before an op does, and would go on with wrong lengths, or end in torch's
    errors. torch.compile traces this without the values of `cu_seqlens` and `region_lengths`.

    Raises:
        ValueError: a shape is wrong, the tensors lie on several devices, or a caption or an image has no rows, or
            other than `words` and `image` hold.
        TypeError: an argument is no tensor, or has a wrong dtype, such as one that the scorer's weights do not have.

    >>> image, words, cu_seqlens = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.tensor([0, 5])
    >>> check_inputs(CrossAttentionScore(), "Scorer", image, words, cu_seqlens, torch.tensor([3, 0]))
    Traceback (most recent call last):
    ValueError: Scorer: region_lengths must lie in 1..3 (R), got 0 for image 1
    """
    check = Arguments(op)
    of_image, of_words, of_bounds = scorer.named
    check.floats(of_image, image, IMAGE)
    check.floats(of_words, words, WORDS)
    check.integers(of_bounds, cu_seqlens, BOUNDS)
    check.weights(of_image, image, scorer)
    check.weights(of_words, words, scorer)
    if region_lengths is not None:
        check.integers("region_lengths", region_lengths, COUNTS)
    if not traced(cu_seqlens):
        bounds(cu_seqlens, len(words), op)
        region_counts(region_lengths, image, op)


def image_state(scorer: Any, image: Tensor, region_lengths: Tensor | None = None, boxes: Tensor | None = None) -> State:
    """`scorer.image_state` of images [I, R, D], with the boxes [I, R, 4] of their regions if it takes them."""
    if getattr(scorer, "takes_boxes", False):
        return scorer.image_state(image, region_lengths, boxes)
    return scorer.image_state(image, region_lengths)


class CrossAttentionScore(PairScorer):
    """SCAN's score as a pair scorer without parameters; arguments as `itm_fast.cross_attention_score`.

    >>> import torch, itm_fast
    >>> from itm_fast.nn import CrossAttentionScore
    >>> words, cu_seqlens = itm_fast.pack(torch.randn(3, 12, 64), [12, 5, 8])
    >>> CrossAttentionScore(pool="mean")(torch.randn(2, 36, 64), words, cu_seqlens).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        direction: Direction = "t2i",
        affinity_norm: Norm = "clipped_l2norm",
        scale: float = 9.0,
        pool: AnyPool = "lse",
        pool_scale: float = 6.0,
        weights: Weights = "softmax",
        threshold: float = 0.0,
        similarity: Similarity = "cosine",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "direction": direction,
            "affinity_norm": affinity_norm,
            "scale": scale,
            "pool": pool,
            "pool_scale": pool_scale,
            "weights": weights,
            "threshold": threshold,
            "similarity": similarity,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        (image,) = image_state
        return cross_attention_score(image, words, cu_seqlens, region_lengths=region_lengths, **self.options)

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions` (t2i) or `words` (i2t), and the `cosines` [W] or [R] of the queries with what they attend to, or
        what else `similarity` is."""
        t2i, options = self.options["direction"] == "t2i", self.options
        query, context = (words, image) if t2i else (image, words)
        affinity = affinity_norm(query @ context.t(), options["affinity_norm"], dim=0)  # [queries, contexts]
        bound = options["scale"] * options["threshold"]
        weight = attention_weights(options["scale"] * affinity, options["weights"], bound, dim=1)
        r = similarities(query, weight @ context, options["similarity"])
        pool = options["pool"], options["pool_scale"]
        score = negative(r, query, *pool, options["threshold"]).mean() if pool[0] in NEGATIVE else pooled(r, *pool, 0)
        return Attention(float(score), {"regions" if t2i else "words": weight, "cosines": r})


class GraphReasoning(nn.Module):
    """One step of similarity graph reasoning over all nodes (SGRAF, equations 5 and 6).

    Args:
        sim_dim: S.

    >>> import torch
    >>> from itm_fast.nn import GraphReasoning
    >>> GraphReasoning(16)(torch.rand(4, 13, 16)).shape
    torch.Size([4, 13, 16])
    """

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.graph_query_w = nn.Linear(sim_dim, sim_dim)
        self.graph_key_w = nn.Linear(sim_dim, sim_dim)
        self.sim_graph_w = nn.Linear(sim_dim, sim_dim)
        for linear in (self.graph_query_w, self.graph_key_w, self.sim_graph_w):
            xavier_(linear)

    def forward(self, sim_emb: Tensor) -> Tensor:
        """Nodes [B, M, S] -> [B, M, S]."""
        query, key = self.graph_query_w(sim_emb), self.graph_key_w(sim_emb)
        edge = torch.bmm(query, key.transpose(1, 2)).softmax(-1)
        return self.sim_graph_w(torch.bmm(edge, sim_emb)).relu()


class SimilarityGraph(nn.ModuleList):
    """SGR: K steps of graph reasoning, each with its own weights; the result is the global node.

    Args:
        sim_dim: S.
        steps: K; with 0 the result is the global node, unchanged.

    >>> import torch
    >>> from itm_fast.nn import SimilarityGraph
    >>> SimilarityGraph(16, 3)(torch.rand(4, 11, 16), torch.tensor([0, 6, 11])).shape
    torch.Size([4, 2, 16])
    """

    def __init__(self, sim_dim: int, steps: int = 3) -> None:
        super().__init__(GraphReasoning(sim_dim) for _ in range(steps))

    def stacked(self) -> list[Tensor]:
        """The parameters of `similarity_graph`: weight [K, S, S] and bias [K, S] of query, key and value."""
        parameters: list[Tensor] = []
        for name in ("graph_query_w", "graph_key_w", "sim_graph_w"):
            linears = [getattr(step, name) for step in self]
            parameters += [torch.stack([x.weight for x in linears]), torch.stack([x.bias for x in linears])]
        return parameters

    def forward(self, nodes: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Nodes [I, M, S] and the captions' bounds in M -> [I, T, S]."""
        if not len(self):
            return nodes[:, cu_seqlens[:-1].long()]
        return similarity_graph(nodes, cu_seqlens, *self.stacked())


class SimilarityFilter(nn.Module):
    """SAF: nodes weighted by a learned gate (SGRAF, equations 8 and 9).

    Its BatchNorm takes statistics over the nodes of one caption with all images, as the published loop over captions
    does. So in training the running statistics are updated once per caption, in the captions' order.

    Args:
        sim_dim: S.

    >>> import torch
    >>> from itm_fast.nn import SimilarityFilter
    >>> SimilarityFilter(16).eval()(torch.rand(4, 11, 16), torch.tensor([0, 6, 11])).shape
    torch.Size([4, 2, 16])
    """

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.attn_sim_w = nn.Linear(sim_dim, 1)
        self.bn = nn.BatchNorm1d(1)
        xavier_(self.attn_sim_w)

    def arguments(self) -> list[Tensor]:
        """The parameters of `similarity_filter`: weight [S]; bias, norm weight and bias, running mean and var, [1]."""
        bn, gate = self.bn, self.attn_sim_w
        running = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
        return [gate.weight[0], gate.bias, bn.weight, bn.bias, *running]

    def filtered(self, nodes: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [I, T, S] and, in training, each caption's mean and biased variance [T]; updates no running statistics."""
        bn, (weight, bias, norm_weight, norm_bias, mean, var) = self.bn, self.arguments()
        if bn.training:
            mean, var = mean.clone(), var.clone()  # backward needs them, and `track` changes the buffers before
        return similarity_filter(
            nodes, cu_seqlens, weight, bias, norm_weight, norm_bias, mean, var, training=bn.training, eps=bn.eps
        )

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics as by one BatchNorm call per caption.

        Args:
            mean: [T], in the captions' order.
            var: [T], biased.
            count: [T], the number of nodes in each mean.

        Raises:
            ValueError: a caption has one node over all images, so it has no unbiased variance.
        """
        if (count < 2).any():
            raise ValueError("SimilarityFilter: in training a caption needs more than one node over all images")
        # T steps of r <- (1 - m) r + m x at once: the last caption's share is m, the one before it m (1 - m), ...
        m, T = cast(float, self.bn.momentum), len(mean)
        share = m * (1.0 - m) ** torch.arange(T - 1, -1, -1, dtype=torch.float64, device=mean.device)
        count = count.double()
        for name, new in (("running_mean", mean), ("running_var", var * (count / (count - 1.0)))):
            self.bn.get_buffer(name).mul_((1.0 - m) ** T).add_((share * new).sum())
        self.bn.get_buffer("num_batches_tracked").add_(T)

    def forward(self, nodes: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Nodes [I, M, S] and the captions' bounds in M -> z [I, T, S]."""
        z, mean, var = self.filtered(nodes, cu_seqlens)
        if self.bn.training:
            self.track(mean, var, nodes.shape[0] * cu_seqlens.diff())
        return z
