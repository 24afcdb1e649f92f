"""TSHSR: two-stream hierarchical similarity reasoning (Chen et al., arXiv 2203.05349), reconstructed from the abstract:
the equations are not public to us.

The abstract says: a module extracts context from the similarities and reasons over it together with the local ones; a
text-to-image and an image-to-text stream; one framework, trained end to end. The rest is our choice, of SGRAF's parts:

    s_g = similarity vector of the global vectors; local nodes X^0 of the stream t2i: those of the words with what they
    attend to, scale 9; of i2t: those of the regions, scale 4                                                    (1)
    X^l = softmax over the nodes of (X^{l-1} W^l)^T X^{l-1}: 4 context nodes, then 1                             (2)
    three steps of SGR over [s_g; X^0; X^1; X^2], read out at node 0, a Linear and a sigmoid                     (3)
    S = the mean of both streams' scores                                                                        (4)

All of it is computed per pair, in blocks of pairs whose temporaries fit the workspace.
"""

from __future__ import annotations

from argparse import Namespace
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from .._names import Direction
from .._workspace import GIB, scratch_bytes, workspace
from ..nn import Attention, PairScorer, SimilarityGraph, State, xavier_
from ..ops import _recompute, cross_attention_similarity, similarity_context, similarity_graph
from ..packing import bounds, region_counts, spans, starts
from ._common import l2norm, without_padding
from ._pair_blocks import Pairs, attended_of_pairs, matched
from ._regulators import aligned
from ._rows import linear, sigmoid
from ._self_attention import GlobalVectors
from ._sgraf_attention import graph_attention, pair_attention
from .sgraf import SGRAF

NAME = "TwoStreamReasoning"
DIRECTIONS: tuple[Direction, ...] = ("t2i", "i2t")
CPU_BLOCK = 128 << 20  # bytes of a block's nodes: smaller blocks lose time to calls, larger ones to fresh memory
CAPTIONS = 32  # most captions of a block, so that it has several images too
SHARE = 4  # single pairs take 1.5 to 2 times as long, each, as among all: their ops run on less at a time
_STREAM = 11  # number of tensors that `Stream.tensors` returns


class Stream(nn.Module):
    """The parameters of one stream.

    Args:
        embed_size: D.
        sim_dim: S.
        context_nodes: context nodes of each level.
        steps: K of the reasoning.
    """

    def __init__(self, embed_size: int, sim_dim: int, context_nodes: Sequence[int], steps: int) -> None:
        super().__init__()
        self.sim_tranloc_w = nn.Linear(embed_size, sim_dim)
        self.context = nn.ModuleList(nn.Linear(sim_dim, c, bias=False) for c in context_nodes)
        self.graph = SimilarityGraph(sim_dim, steps)
        self.sim_eval_w = nn.Linear(sim_dim, 1)
        for part in (self.sim_tranloc_w, self.sim_eval_w):
            xavier_(part)
        for level in self.context:
            nn.init.xavier_uniform_(level.weight)  # type: ignore[arg-type]

    def tensors(self) -> list[Tensor]:
        """The parameters, in the order in which `TwoStreamReasoning._block` unpacks them."""
        local, final = self.sim_tranloc_w, self.sim_eval_w
        assignment = torch.cat([level.weight for level in self.context])  # type: ignore[misc]
        return [local.weight, local.bias, assignment, *self.graph.stacked(), final.weight[0], final.bias]


class TwoStreamReasoning(GlobalVectors):
    """TSHSR's pair scorer, reconstructed from the abstract: the equations are not public to us. See the module.

    Args:
        embed_size: D.
        sim_dim: S.
        context_nodes: context nodes of each level of the hierarchy.
        steps: K of the reasoning.
        scale_t2i: inverse temperature of words attending to regions.
        scale_i2t: inverse temperature of regions attending to words.
        num_region: R.
        dropout_rate: of VisualSA and TextSA.

    Raises:
        ValueError: a number is out of its range.

    >>> scorer = TwoStreamReasoning(8, 4).eval()
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        embed_size: int,
        sim_dim: int,
        context_nodes: Sequence[int] = (4, 1),
        steps: int = 3,
        scale_t2i: float = 9.0,
        scale_i2t: float = 4.0,
        num_region: int = 36,
        dropout_rate: float = 0.4,
    ) -> None:
        if not context_nodes or min(context_nodes) < 1:
            raise ValueError(f"{NAME}: context_nodes must be positive, one number a level, got {list(context_nodes)}")
        if steps < 1:
            raise ValueError(f"{NAME}: steps must be at least 1, got {steps}")
        super().__init__(embed_size, num_region, dropout_rate)
        self.sim_tranglo_w = nn.Linear(embed_size, sim_dim)
        xavier_(self.sim_tranglo_w)
        self.t2i = Stream(embed_size, sim_dim, context_nodes, steps)
        self.i2t = Stream(embed_size, sim_dim, context_nodes, steps)
        self.sizes = [int(n) for n in context_nodes]
        self.scale_t2i, self.scale_i2t = float(scale_t2i), float(scale_i2t)

    def extra_repr(self) -> str:
        return f"scale_t2i={self.scale_t2i}, scale_i2t={self.scale_i2t}"

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores in (0, 1), [I, T], of the images and captions whose states are given."""
        overall = self.sim_tranglo_w
        tensors = [
            *image_state, words, *caption_state, overall.weight, overall.bias, *self.t2i.tensors(),
            *self.i2t.tensors(),
        ]  # fmt: skip
        axes = "IINT" + "." * (len(tensors) - 4)
        (_, R, D), S = image_state[0].shape, len(overall.weight)

        def pair_bytes(length: int) -> int:
            return 4 * (length + R) * 4 * (D + 2 * S)

        few = partial(matched, axes, pair_bytes, self._pairs)
        numbers = _recompute.dense_record(image_state[0], words, len(cu_seqlens) - 1, S)
        return _recompute.score(self._cut, axes, tensors, cu_seqlens, region_lengths, (), few, SHARE, numbers=numbers)

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions` of the stream t2i, `words` of i2t, and the edges of their K steps over the M nodes, in the order
        s_g, X^0, X^1, X^2: `edges_t2i` [K, M, M], `edges_i2t`."""
        cu_seqlens = torch.tensor([0, len(words)], dtype=torch.int32, device=words.device)
        (_, image_global), (caption_global,) = self.image_state(image[None]), self.caption_state(words, cu_seqlens)
        overall = l2norm(self.sim_tranglo_w((image_global - caption_global).square()))
        weights: dict[str, Tensor] = {}
        total = 0.0
        for name, stream, query, context, scale in (
            ("regions", self.t2i, words, image, self.scale_t2i),
            ("words", self.i2t, image, words, self.scale_i2t),
        ):
            weight = pair_attention(query, context, scale)
            level = l2norm(stream.sim_tranloc_w((l2norm(weight @ context) - query).square()))
            nodes = [overall, level]
            for assignment in stream.context:
                level = assignment(level).softmax(0).t() @ level
                nodes.append(level)
            logit, edges = graph_attention(stream.graph, stream.sim_eval_w, torch.cat(nodes))
            weights |= {name: weight, f"edges_{'t2i' if name == 'regions' else 'i2t'}": edges}
            total += float(logit.sigmoid()) / 2
        return Attention(total, weights)

    def _cut(self, backward: bool, *args) -> Iterator[_recompute.Block]:
        """Yield blocks: images that have the same number of regions, with some captions."""
        (image, _, words, _), weights, (cu_seqlens, region_lengths) = args[:4], args[4:-2], args[-2:]
        I, S, item = len(image), len(weights[0]), max(4, image.element_size())
        counts = region_counts(region_lengths, image, NAME)
        edge = bounds(cu_seqlens, len(words), NAME)
        # Half of the workspace is for a block's nodes, of which backward keeps several copies; half is for the ops
        # that run on them.
        half = scratch_bytes(image.device) // 2
        limit = half // 4 if backward else half
        limit = min(limit, CPU_BLOCK) if image.device.type == "cpu" else limit
        most = limit // (4 * S * item)  # nodes of a block: two copies for each of two streams
        T, more = len(edge) - 1, 1 + sum(self.sizes)
        for n in sorted(set(counts)):
            mine = [i for i, count in enumerate(counts) if count == n]
            chosen = torch.tensor(mine, device=image.device)
            first = 0
            while first < T:
                stop = bisect_right(edge, edge[first] + max(0, most - CAPTIONS * (n + 2 * more))) - 1
                stop = max(first + 1, min(stop, first + CAPTIONS, T))
                captions, rows = slice(first, stop), slice(edge[first], edge[stop])
                nodes = edge[stop] - edge[first] + (stop - first) * (n + 2 * more)
                run = partial(self._block, half / GIB, cu_seqlens[first : stop + 1] - cu_seqlens[first])
                for at in spans(len(mine), max(1, most // nodes)):
                    images = at if len(mine) == I else chosen[at]
                    inputs = (images, slice(0, n)), (images,), (rows,), (captions,), *[()] * len(weights)
                    yield _recompute.Block(inputs, (images, captions), run)
                first = stop

    def _block(self, gib, cu_seqlens, image, image_global, words, caption_global, weight, bias, *streams) -> Tensor:
        """Scores of images [b, n, D], all of whose rows are regions, with captions."""
        n, c = image.shape[1], len(caption_global)
        with workspace(gib):
            overall = linear((rearrange(image_global, "b d -> b 1 d") - caption_global).square(), weight, bias)
            overall = l2norm(overall)  # [b, c, S]
            total = overall.new_zeros(overall.shape[:2])
            for direction, scale in zip(DIRECTIONS, (self.scale_t2i, self.scale_i2t)):
                mine = streams[:_STREAM] if direction == "t2i" else streams[_STREAM:]
                local = cross_attention_similarity(
                    image, words, cu_seqlens, *mine[:2], direction=direction, scale=scale
                )
                edge = cu_seqlens
                if direction == "i2t":
                    local = rearrange(local, "b c n s -> b (c n) s")
                    edge = n * torch.arange(c + 1, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
                nodes = similarity_context(overall, local, edge, mine[2], self.sizes)
                del local
                total = total + self._reasoned(mine, nodes, edge) / 2
        return total

    def _pairs(self, pairs: Pairs, image, image_global, words, caption_global, weight, bias, *streams) -> Tensor:
        """As `_block`, [P] of P pairs, with an image and a caption for each: of one image with P captions, as it
        were, once the local nodes are known."""
        P, R = image.shape[:2]
        counts, valid = pairs.region_lengths, None
        if counts is not None:
            image, valid = without_padding(image, counts)
        overall = l2norm(linear((image_global - caption_global).square(), weight, bias))[None]
        words_of = starts(torch.full((P,), pairs.length))
        regions_of = starts(torch.full((P,), R) if counts is None else counts)
        t2i, i2t = streams[:_STREAM], streams[_STREAM:]
        attended = attended_of_pairs(image, counts, words, scale=self.scale_t2i)
        of_words = aligned(words, attended, t2i[:2], None).flatten(0, 1)
        attended = attended_of_pairs(words, None, image, scale=self.scale_i2t)
        of_regions = aligned(image, attended, i2t[:2], None)
        of_regions = of_regions.flatten(0, 1) if valid is None else of_regions[valid]
        total = overall.new_zeros(P)
        for mine, local, edge in ((t2i, of_words, words_of), (i2t, of_regions, regions_of)):
            nodes = similarity_context(overall, local[None], edge, mine[2], self.sizes)
            total = total + self._reasoned(mine, nodes, edge)[0] / 2
        return total

    def _reasoned(self, stream: Sequence[Tensor], nodes: Tensor, edge: Tensor) -> Tensor:
        """A stream's scores [b, c] by (3), from all its nodes and the bounds of the local ones."""
        *graph, weight, bias = stream[3:]
        more = 1 + sum(self.sizes)
        z = similarity_graph(nodes, edge + more * torch.arange(len(edge), dtype=edge.dtype, device=edge.device), *graph)
        return sigmoid(rearrange(linear(z, weight[None], bias), "b c 1 -> b c"))


class TSHSR(SGRAF):
    """Two-stream hierarchical similarity reasoning: SGRAF's encoders, `TwoStreamReasoning`, loss and optimizer.

    Reconstructed from the abstract: the equations are not public to us.

    Args:
        opt: the options of SGRAF's encoders and training, and sim_dim, context_nodes, sgr_step, lambda_t2i and
            lambda_i2t; `opt.device` and `opt.num_region` are optional.

    Raises:
        ValueError: an option is missing or has a value out of its range.

    >>> model = TSHSR(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4, sim_dim=4,
    ...     context_nodes=[4, 1], sgr_step=3, lambda_t2i=9.0, lambda_i2t=4.0))
    >>> model.val_start()
    >>> ids = torch.tensor([[1, 4, 2], [1, 2, 0]])
    >>> model.forward_sim(*model.forward_emb(torch.randn(2, 36, 6), ids, [3, 2])).shape
    torch.Size([2, 2])
    """

    options = ("sim_dim", "context_nodes", "sgr_step", "lambda_t2i", "lambda_i2t")

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """The pair scorer that the options describe."""
        return TwoStreamReasoning(
            opt.embed_size, opt.sim_dim, opt.context_nodes, opt.sgr_step, opt.lambda_t2i, opt.lambda_i2t,
            getattr(opt, "num_region", 36),
        )  # fmt: skip
