"""HGAN: hierarchical graph alignment network (Guo et al., arXiv 2212.08281), reconstructed from the abstract: the
equations are not public to us.

The abstract says: feature graphs for each modality; a multi-granularity shared space made by feature aggregation and
rearrangement (MFAR) that relates local and global information; three levels of similarity. The rest is our choice:

    E = softmax_j(x_i Wq (x_j Wk)^T / sqrt(D)),   X <- l2norm(X + relu(E X Wg)), twice, per modality              (1)
    g = VisualSA or TextSA of SGRAF over X                                                                       (2)
    u_i = [x_i; g],  u_0 = [g; mean x];  for each granularity c: u as [2, c, D / c], transposed to [c, 2, D / c], a
    linear map of each of the c groups, relu; with their sum over c,  x_i <- l2norm(x_i + .),  g <- l2norm(g + .)  (3)
    S = local-local + global-local + global-global:                                                              (4)
        the mean of SCAN's t2i and i2t mean cosines; the mean of `global_local_score` of the image's vector with the
        words and of the caption's with the regions; the cosine of the global vectors

(1) to (3) depend on one image or one caption and are computed once; (3)'s weights are shared by the modalities. Only
(4) is computed for pairs.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from .._names import Direction
from .._workspace import scratch_bytes
from ..nn import Attention, CrossAttentionScore, PairScorer, State
from ..ops import cross_attention_score, global_local_score
from ..packing import bounds, spans, valid
from ._common import cosine, l2norm, sums
from ._rows import apart, linear
from ._self_attention import GlobalVectors
from .sgraf import SGRAF

NAME = "HierarchicalAlignment"
COPIES = 12  # temporaries [L, D] per image or caption that exist at once while states are computed


class Layout:
    """Converts rows of B items between packed [N, D] and padded [B, L, D]; `real` [B, L] is False for padding."""

    def __init__(self, lengths: Tensor, longest: int) -> None:
        self.lengths = lengths
        self.real = valid(lengths, longest)
        self.owner = torch.repeat_interleave(lengths)  # [N], the item of each row
        self._full = len(self.owner) == self.real.numel()

    def pad(self, rows: Tensor) -> Tensor:
        """[N, D] -> [B, L, D] with zeros beyond each item's rows."""
        if self._full:
            return rearrange(rows, "(b l) d -> b l d", b=len(self.real))
        padded = rows.new_zeros(*self.real.shape, rows.shape[1])
        padded[self.real] = rows
        return padded

    def rows(self, padded: Tensor) -> Tensor:
        """[B, L, D] -> [N, D]."""
        return rearrange(padded, "b l d -> (b l) d") if self._full else padded[self.real]


class FeatureGraph(nn.Module):
    """One layer of a feature graph, equation (1): each row of an item attends to the rows of the same item.

    Args:
        embed_size: D.
    """

    def __init__(self, embed_size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(embed_size, embed_size, bias=False) for _ in range(3))
        for part in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(part.weight)

    def forward(self, rows: Tensor, layout: Layout, adjacency: Tensor | None) -> Tensor:
        """Rows [N, D] in `layout` -> [N, D]; `adjacency` bool [B, L, L] says which rows are neighbours, None: all."""
        D = rows.shape[1]
        query, key, value = self._products(rows)
        if apart(rows, *self.parameters()):
            return l2norm(rows + _each(rows, query, value, layout, adjacency).relu())
        logits = torch.bmm(layout.pad(query), rearrange(layout.pad(key), "b l d -> b d l")) / math.sqrt(D)
        near = layout.real[:, None, :] if adjacency is None else adjacency & layout.real[:, None, :]
        # A row without neighbours receives zero: its softmax is over all rows, as over none it is NaN, and then masked.
        edge = logits.masked_fill(~near & near.any(2, keepdim=True), float("-inf")).softmax(2) * near
        return l2norm(rows + layout.rows(torch.bmm(edge, layout.pad(value))).relu())

    def _products(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows [N, D]; as x Wq (x Wk)^T = (x M) x^T, they may be x M, x and x Wg.

        M costs as much as the keys of D rows, so fewer rows do without it; not in C++, where an item's bits must not
        depend on the other items.
        """
        query, key, value = self.query.weight, self.key.weight, self.value.weight
        if len(rows) < rows.shape[1] and not apart(rows, query, key, value):
            return linear(rows, query), linear(rows, key), linear(rows, value)
        of_query, of_value = linear(rows, torch.cat([linear(key.t(), query.t()), value])).split(rows.shape[1], 1)
        return of_query, rows, of_value


def _each(rows: Tensor, query: Tensor, value: Tensor, layout: Layout, adjacency: Tensor | None) -> Tensor:
    """The weighted sum over each row's neighbours in equation (1), computed item by item."""
    found, start = [], 0
    for k, n in enumerate(layout.lengths.tolist()):
        at, start = slice(start, start + n), start + n
        logits = linear(query[at], rows[at]) / math.sqrt(rows.shape[1])
        if adjacency is None:
            edge = logits.softmax(1)
        else:
            near = adjacency[k, :n, :n]
            edge = logits.masked_fill(~near & near.any(1, keepdim=True), float("-inf")).softmax(1) * near
        found.append(linear(edge, value[at].t()))
    return torch.cat(found)


class Rearrangement(nn.Module):
    """MFAR: local and global features side by side in groups of channels, at several granularities.

    Args:
        embed_size: D.
        granularities: numbers of groups, each a divisor of D.
    """

    def __init__(self, embed_size: int, granularities: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for c in granularities:
            d = embed_size // c
            self.weight.append(nn.Parameter(torch.empty(c, d, 2 * d).uniform_(-1, 1) * math.sqrt(2 / d)))
            self.bias.append(nn.Parameter(torch.zeros(embed_size)))

    def forward(self, rows: Tensor, overall: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Locals [N, D] and global vectors [B, D] -> the same, refined."""
        mean = (sums(rows, layout.lengths) / layout.lengths[:, None]).to(rows.dtype)
        N, B = len(rows), len(overall)
        locals_, others = torch.cat([rows, overall]), torch.cat([overall, mean])
        total = torch.zeros_like(locals_)
        for weight, bias in zip(self.weight, self.bias, strict=True):
            # The second half of u_i is the same for all rows of an item, so it is multiplied once per item.
            own = _grouped(locals_, weight[:, :, : weight.shape[1]])
            other = _grouped(others, weight[:, :, weight.shape[1] :])
            total = total + (own + torch.cat([other[:B][layout.owner], other[B:]]) + bias).relu()
        refined = l2norm(locals_ + total)
        return refined[:N], refined[N:]


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each of c groups of channels by its own matrix: x [n, D], weight [c, D / c, D / c] -> [n, D]."""
    if len(weight) == 1:
        return linear(x, weight[0])
    groups = rearrange(x, "n (c d) -> c n d", c=len(weight))
    if apart(x, weight):
        return torch.cat([linear(group, of_group) for group, of_group in zip(groups, weight, strict=True)], 1)
    mapped = torch.bmm(groups, rearrange(weight, "c out d -> c d out"))
    return rearrange(mapped, "c n out -> n (c out)")


class HierarchicalAlignment(GlobalVectors):
    """HGAN's pair scorer, reconstructed from the abstract: the equations are not public to us. See the module.

    Args:
        embed_size: D.
        graph_layers: layers of the feature graphs.
        granularities: numbers of channel groups, each a divisor of D.
        levels: weights of the local-local, global-local and global-global similarity; 0 leaves one out.
        scale_t2i: inverse temperature of words attending to regions.
        scale_i2t: inverse temperature of regions attending to words.
        scale_global: inverse temperature of global vectors attending to locals.
        share_local: share of t2i in the local-local similarity, i2t having the rest.
        share_global: share of the image's vector in the global-local similarity, the caption's having the rest.
        num_region: R.
        dropout_rate: of VisualSA and TextSA.

    Raises:
        ValueError: a number is out of its range.

    >>> scorer = HierarchicalAlignment(16).eval()
    >>> scorer(torch.randn(2, 36, 16), torch.randn(3, 5, 16), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    per_word = 1

    def __init__(
        self,
        embed_size: int,
        graph_layers: int = 2,
        granularities: Sequence[int] = (1, 4, 16),
        levels: Sequence[float] = (1.0, 1.0, 1.0),
        scale_t2i: float = 9.0,
        scale_i2t: float = 4.0,
        scale_global: float = 1.0,
        share_local: float = 0.5,
        share_global: float = 0.5,
        num_region: int = 36,
        dropout_rate: float = 0.4,
    ) -> None:
        if graph_layers < 0:
            raise ValueError(f"{NAME}: graph_layers must be at least 0, got {graph_layers}")
        if any(c < 1 or embed_size % c for c in granularities):
            raise ValueError(
                f"{NAME}: granularities must divide embed_size = {embed_size}, got {', '.join(map(str, granularities))}"
            )
        if len(levels) != 3 or not any(levels):
            raise ValueError(f"{NAME}: levels must be three weights, not all of them 0, got {tuple(levels)}")
        super().__init__(embed_size, num_region, dropout_rate)
        self.v_graph = nn.ModuleList(FeatureGraph(embed_size) for _ in range(graph_layers))
        self.t_graph = nn.ModuleList(FeatureGraph(embed_size) for _ in range(graph_layers))
        self.mfar = Rearrangement(embed_size, granularities)
        self.levels = tuple(float(weight) for weight in levels)
        self.scale_t2i, self.scale_i2t, self.scale_global = float(scale_t2i), float(scale_i2t), float(scale_global)
        self.share_local, self.share_global = float(share_local), float(share_global)

    def extra_repr(self) -> str:
        names = ("levels", "scale_t2i", "scale_i2t", "scale_global", "share_local", "share_global")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def image_state(
        self, image: Tensor, region_lengths: Tensor | None = None, adjacency: Tensor | None = None
    ) -> State:
        """The image, and its refined regions and global vector.

        Args:
            image: [I, R, D].
            region_lengths: [I] regions of each image; None means R for all.
            adjacency: [I, R, R], nonzero where regions are neighbours in the feature graph; None means all are.

        Returns:
            [I, R, D], [I, R, D] with zeros beyond each image's regions, [I, D].
        """
        self.check_regions(image)
        I, R, D = image.shape

        def part(at: slice) -> State:
            layout = Layout(lengths[at], R)
            rows = self._through(self.v_graph, layout.rows(image[at]), layout, adjacency, at)
            overall = self._image_global(layout.pad(rows), None if region_lengths is None else region_lengths[at])
            rows, overall = self.mfar(rows, overall, layout)
            return layout.pad(rows), overall

        lengths = torch.full((I,), R, device=image.device) if region_lengths is None else region_lengths.long()
        if not I:
            return image, image, image.new_empty(0, D)
        return image, *self._in_parts(part, I, R * D * image.element_size(), image.device)

    def caption_state(self, words: Tensor, cu_seqlens: Tensor, adjacency: Tensor | None = None) -> State:
        """The captions' refined words and global vectors.

        Args:
            words: [N, D].
            cu_seqlens: [T + 1].
            adjacency: [T, W, W] with W at least the longest caption, nonzero where words are neighbours in the feature
                graph, such as in a parse; None means all are.

        Returns:
            [N, D], [T, D].
        """
        edge, lengths = bounds(cu_seqlens, len(words), NAME), cu_seqlens.diff().long()
        if len(edge) == 1:
            return words, words
        longest = int(lengths.max())

        def part(at: slice) -> State:
            layout = Layout(lengths[at], longest)
            rows = words[edge[at.start] : edge[at.stop]]
            rows = self._through(self.t_graph, rows, layout, adjacency, at)
            overall = self.t_global_w.packed(rows, cu_seqlens[at.start : at.stop + 1])
            return self.mfar(rows, overall, layout)

        each = longest * words.shape[1] * words.element_size()
        return self._in_parts(part, len(lengths), each, words.device)

    def _through(
        self, graph: nn.ModuleList, rows: Tensor, layout: Layout, adjacency: Tensor | None, at: slice
    ) -> Tensor:
        near = None
        if adjacency is not None:
            L = layout.real.shape[1]
            near = adjacency[at, :L, :L] != 0
        for layer in graph:
            rows = layer(rows, layout, near)
        return rows

    def _in_parts(self, part: Callable[[slice], State], count: int, each: int, device: torch.device) -> State:
        """Call `part` on slices of 0..count and concatenate; without gradients, slices are cut to fit the workspace."""
        size = count
        if not torch.is_grad_enabled() and not self.training:
            size = max(1, scratch_bytes(device) // (COPIES * each))
        parts = [part(at) for at in spans(count, size)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(x) for x in zip(*parts, strict=True))

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T] of the images and captions whose states are given."""
        (_, regions, image_global), (words, caption_global) = image_state, caption_state
        local, between, overall = self.levels
        total: Tensor | float = 0.0
        if local:
            ways: tuple[tuple[Direction, float, float], ...] = (
                ("t2i", self.scale_t2i, self.share_local),
                ("i2t", self.scale_i2t, 1 - self.share_local),
            )
            for direction, scale, share in ways:
                if share:
                    total = total + local * share * cross_attention_score(
                        regions, words, cu_seqlens, direction=direction, scale=scale, pool="mean",
                        region_lengths=region_lengths,
                    )  # fmt: skip
        if between:
            I, R, _ = regions.shape
            of_image = self._global_local(image_global, words, cu_seqlens)
            # Rows beyond an image's regions are zero. They take attention weight and add nothing, which makes the
            # attended vector shorter; its cosine stays the same.
            rows, region_bounds = rearrange(regions, "i r d -> (i r) d"), R * torch.arange(I + 1, device=regions.device)
            of_caption = self._global_local(caption_global, rows, region_bounds).t()
            total = total + between * (self.share_global * of_image + (1 - self.share_global) * of_caption)
        if overall:
            lengths = (torch.linalg.vector_norm(x, dim=1) for x in (image_global, caption_global))
            both = torch.outer(*lengths).clamp_min(1e-8)
            total = total + overall * (linear(image_global, caption_global) / both)
        assert isinstance(total, Tensor)
        return total

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions`, `words`, and what the global vectors attend to: `image_words` [W] and `caption_regions` [R]."""
        cu_seqlens = torch.tensor([0, len(words)], dtype=torch.int32, device=words.device)
        (_, regions, image_global), (rows, caption_global) = (
            self.image_state(image[None]), self.caption_state(words, cu_seqlens)
        )  # fmt: skip
        weights, total = {}, 0.0
        ways: tuple[tuple[str, Direction, float, float], ...] = (
            ("regions", "t2i", self.scale_t2i, self.share_local),
            ("words", "i2t", self.scale_i2t, 1 - self.share_local),
        )
        for name, direction, scale, share in ways:
            one = CrossAttentionScore(direction, scale=scale, pool="mean").attention(regions[0], rows)
            weights[name] = one.weights[name]
            total += self.levels[0] * share * one.score
        for name, vector, others, share in (
            ("image_words", image_global[0], rows, self.share_global),
            ("caption_regions", caption_global[0], regions[0], 1 - self.share_global),
        ):
            weights[name] = (self.scale_global * cosine(vector, others)).softmax(0)
            total += self.levels[1] * share * float(cosine(vector, weights[name] @ others))
        total += self.levels[2] * float(cosine(image_global[0], caption_global[0]))
        return Attention(total, weights)

    def _global_local(self, vector: Tensor, rows: Tensor, edge: Tensor) -> Tensor:
        return global_local_score(vector, rows, edge, scale=self.scale_global)


class HGAN(SGRAF):
    """Hierarchical graph alignment network: SGRAF's encoders, `HierarchicalAlignment`, loss and optimizer.

    Reconstructed from the abstract: the equations are not public to us.

    Args:
        opt: the options of SGRAF's encoders and training, and graph_layers, granularities, levels, lambda_t2i,
            lambda_i2t, lambda_global, share_local and share_global; `opt.device` and `opt.num_region` are optional.

    Raises:
        ValueError: an option is missing or has a value out of its range.

    >>> model = HGAN(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=16, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4, graph_layers=2,
    ...     granularities=[1, 4, 16], levels=[1.0, 1.0, 1.0], lambda_t2i=9.0, lambda_i2t=4.0, lambda_global=1.0,
    ...     share_local=0.5, share_global=0.5))
    >>> model.val_start()
    >>> ids = torch.tensor([[1, 4, 2], [1, 2, 0]])
    >>> model.forward_sim(*model.forward_emb(torch.randn(2, 36, 6), ids, [3, 2])).shape
    torch.Size([2, 2])
    """

    options = (
        "graph_layers", "granularities", "levels", "lambda_t2i", "lambda_i2t", "lambda_global", "share_local",
        "share_global",
    )  # fmt: skip

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """The pair scorer that the options describe."""
        return HierarchicalAlignment(
            opt.embed_size, opt.graph_layers, opt.granularities, opt.levels, opt.lambda_t2i, opt.lambda_i2t,
            opt.lambda_global, opt.share_local, opt.share_global, getattr(opt, "num_region", 36),
        )  # fmt: skip
