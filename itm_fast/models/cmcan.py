"""CMCAN (Zhang et al., AAAI 2022): cross-modal confidence-aware network, after CrossmodalGroup/CMCAN's code.

With vec(W; d) = l2norm(relu(W d^2 + b)), regions v, words t, and the attention of SCAN at inverse temperature 9:

    e     = VisualSA's logits of the regions,   u = sum softmax(e) v,   N = |u| + 1e-8,   v_g = u / N    (1)
    p_r   = the sum of softmax(e) v over r's neighbours, and r itself up to 5 regions, divided by N      (2)
    s_g   = vec(tranglo; v_g - t_g),   t_g as in SGRAF                                                   (3)
    s^t_j = vec(tranloc_wt; l2norm(P_j) - t_j),   s^v_i = vec(tranloc_wv; l2norm(P_i) - v_i)             (4)
    c     = sigmoid(LayerNorm over the regions of w . (vec(tranpar_wv; p_i - t_g) o s_g) + b)            (5)
    z_t   = node 0 of SGR over [s_g; s^t],   z_v = node 0 of SGR over [s_g; c o s^v]                     (6)
    S     = sigmoid(w_e . [z_t; z_v] + b_e)                                                              (7)

A region's neighbours are the ones of its row in `adjacency`, or follow from the regions' boxes; without either a region
has no neighbour but itself.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._workspace import scratch_bytes
from ..nn import Attention, PairScorer, State, check_inputs
from ..ops import _recompute, attended_vectors
from ..ops._calls import CONFIDENCE_MATCHING
from ..ops._cpu_calls import score as cpu_score
from ..packing import bounds, region_counts, spans
from ._boxes import checked, neighbours
from ._common import PaddedScorer, l2norm, require_regions
from ._confidence import PARTIAL, GraphEmbt, GraphEmbv, GraphReasoner, equal_nodes, pair_scores
from ._lengths import packed
from ._pair_blocks import Pairs, attended_of_pairs, blocks, matched, nodes_of
from ._rows import apart
from ._sgraf_attention import graph_attention, pair_attention
from .sgraf import SGRAF

NAME = "ConfidenceMatching"
SMOOTH = 9.0


class ConfidenceMatching(PaddedScorer):
    """CMCAN's pair scorer, (1) to (7).

    Args:
        embed_size: D.
        sim_dim: S.
        self_layers: steps of both graphs.
        num_region: R.
        dropout_rate: of both self-attentions.

    Raises:
        ValueError: `self_layers` is less than 1.

    >>> scorer = ConfidenceMatching(8, 4).eval()
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    takes_boxes = True
    without_boxes = "so CMCAN scores without neighbours of regions, not as in its paper"

    def __init__(
        self, embed_size: int, sim_dim: int, self_layers: int = 3, num_region: int = 36, dropout_rate: float = 0.4
    ) -> None:
        super().__init__()
        if self_layers < 1:
            raise ValueError(f"{NAME}: self_layers must be at least 1, got {self_layers}")
        self.sim_embt = GraphEmbt(embed_size, sim_dim)
        self.sim_embv = GraphEmbv(embed_size, sim_dim, num_region, dropout_rate)
        self.sim_enc = GraphReasoner(sim_dim, self_layers)

    def forward(  # type: ignore[override]
        self, img_emb: Tensor, cap_emb: Tensor, cap_lens, region_lengths: Tensor | None = None,
        adjacency: Tensor | None = None, boxes: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Score every image against every caption; arguments as `PaddedScorer.forward`.

        Args:
            adjacency: [I, R, R], 1 where a region (row) has a neighbour, at most 5 a row; None: those by `boxes`.
            boxes: [I, R, 4], left, top, right and bottom as parts of the picture; None: no neighbours.

        Raises:
            ValueError: a shape or length is wrong, a region has more than 5 neighbours, or boxes are in pixels.
        """
        words, cu_seqlens = packed(NAME, cap_emb, cap_lens)
        check_inputs(self, NAME, img_emb, words, cu_seqlens, region_lengths)
        image_state = self.image_state(img_emb, region_lengths, boxes, adjacency)
        return self.score(image_state, words, cu_seqlens, self.caption_state(words, cu_seqlens), region_lengths)

    @staticmethod
    def _check(adjacency: Tensor, image: Tensor) -> None:
        if adjacency.shape != (len(image), image.shape[1], image.shape[1]):
            wanted, said = f"[I, R, R] with I = {len(image)} and the R of image", list(adjacency.shape)
            raise ValueError(f"{NAME}: adjacency must be {wanted}, got {said}")
        if int(adjacency.eq(1).sum(-1).max() if adjacency.numel() else 0) > PARTIAL:
            raise ValueError(f"{NAME}: a region has more than {PARTIAL} neighbours in adjacency, and no rule chooses")

    def image_state(
        self,
        image: Tensor,
        region_lengths: Tensor | None = None,
        boxes: Tensor | None = None,
        adjacency: Tensor | None = None,
    ) -> State:
        """The image [I, R, D], its global vector [I, D] and its partial vectors [I, R, D]; arguments as `forward`."""
        require_regions(NAME, image, self.sim_embv.emb_local_bn.num_features)
        if adjacency is not None:
            self._check(adjacency, image)
        elif boxes is not None:
            adjacency = neighbours(checked(NAME, boxes, image, region_lengths), region_lengths)
        if torch.is_grad_enabled() or self.sim_embv.training:
            return image, *self.sim_embv.image(image, adjacency, region_lengths)
        size = max(1, scratch_bytes(image.device) // (6 * image[:1].nbytes or 1))
        given = adjacency, region_lengths
        found = [
            self.sim_embv.image(image[at], *(None if x is None else x[at] for x in given))
            for at in spans(len(image), size)
        ]
        if not found:
            return image, image[:, 0], image
        return image, torch.cat([x for x, _ in found]), torch.cat([x for _, x in found])

    def caption_state(self, words: Tensor, cu_seqlens: Tensor) -> State:
        """The captions' global vectors: words [N, D] -> [T, D]."""
        return (self.sim_embv.t_global_w.in_parts(words, cu_seqlens, NAME),)

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores in (0, 1), [I, T], of the images and captions whose states are given."""
        v, final = self.sim_embv, self.sim_enc
        layers = (
            v.sim_tranglo_w, self.sim_embt.sim_tranloc_wt, v.sim_tranloc_wv, v.sim_tranpar_wv, v.emb_similarity, v.ln,
            final.sim_eval_w,
        )  # fmt: skip
        weights: list[Tensor] = [getattr(layer, name) for layer in layers for name in ("weight", "bias")]
        tensors = *image_state, words, *caption_state, *weights, *final.module_t.stacked(), *final.module_v.stacked()
        R, D = image_state[0].shape[1:]

        def pair_bytes(length: int) -> int:
            return (length + R) * D * 4 * 4

        axes = "IIINT" + "." * (len(tensors) - 5)

        def cut(backward: bool, *args: Tensor) -> Iterator[_recompute.Block]:
            if backward or not apart(*args[: len(axes)]):
                yield from blocks(NAME, axes, pair_bytes, self._block, backward, *args, joined=True)
                return
            cu_seqlens, region_lengths = args[-2:]
            bounds(cu_seqlens, len(args[axes.index("N")]), NAME)
            region_counts(region_lengths, args[0], NAME)
            yield _recompute.Block(((),) * len(axes), (), partial(_in_one_pass, cu_seqlens, region_lengths))

        few = partial(matched, axes, pair_bytes, self._pairs)
        numbers = _recompute.dense_record(image_state[0], words, len(cu_seqlens) - 1, len(weights[0]))
        return _recompute.score(cut, axes, tensors, cu_seqlens, region_lengths, (), few, numbers=numbers)

    def attention(self, image: Tensor, words: Tensor, boxes: Tensor | None = None) -> Attention:
        """`regions`, `words`, the regions' `confidence` [R] of (5), and the edges of both graphs, `edges_words`
        [K, 1 + W, 1 + W] and `edges_regions` [K, 1 + R, 1 + R]."""
        cu_seqlens = torch.tensor([0, len(words)], dtype=torch.int32, device=words.device)
        _, image_global, part = self.image_state(image[None], None, None if boxes is None else boxes[None])
        (caption_global,) = self.caption_state(words, cu_seqlens)
        v, final = self.sim_embv, self.sim_enc

        def vector(layer: Any, difference: Tensor) -> Tensor:
            return l2norm(layer(difference.square()).relu())

        overall = vector(v.sim_tranglo_w, image_global - caption_global)
        confidence = v.emb_similarity(vector(v.sim_tranpar_wv, part[0] - caption_global) * overall)[:, 0]
        weights = {"confidence": v.ln(confidence).sigmoid()}
        read = []
        for name, query, context, layer, graph in (
            ("regions", words, image, self.sim_embt.sim_tranloc_wt, final.module_t),
            ("words", image, words, v.sim_tranloc_wv, final.module_v),
        ):
            weights[name] = pair_attention(query, context, SMOOTH)
            local = vector(layer, l2norm(weights[name] @ context) - query)
            local = local if name == "regions" else weights["confidence"][:, None] * local
            node, edges = graph_attention(graph, nn.Identity(), torch.cat([overall, local]))
            weights[{"regions": "edges_words", "words": "edges_regions"}[name]] = edges
            read.append(node)
        return Attention(float(final.sim_eval_w(torch.cat(read)).sigmoid()), weights)

    def _block(self, of, cu_seqlens, region_lengths, image, image_global, part, words, caption_global, *weights):
        """Scores of a block, [b, c]."""

        def scores(image: Tensor, image_global: Tensor, part: Tensor) -> Tensor:
            attend = partial(attended_vectors, image, words, cu_seqlens, scale=SMOOTH)
            made = attend, partial(attend, direction="i2t"), partial(nodes_of, cu_seqlens)
            return pair_scores(image, image_global, part, words[None], caption_global[None], *made, *weights)

        return _by_regions(scores, region_lengths, image, image_global, part)

    def _pairs(self, pairs: Pairs, image, image_global, part, words, caption_global, *weights) -> Tensor:
        """As `_block`, [P] of P pairs, with an image and a caption for each."""

        def scores(image: Tensor, image_global: Tensor, part: Tensor, words: Tensor, caption_global: Tensor) -> Tensor:
            to_words = lambda: attended_of_pairs(image, None, words, scale=SMOOTH)[:, None]  # noqa: E731
            to_regions = lambda: attended_of_pairs(words, None, image, scale=SMOOTH)[:, None]  # noqa: E731
            made = to_words, to_regions, equal_nodes
            return pair_scores(image, image_global, part, words[:, None], caption_global[:, None], *made, *weights)

        return _by_regions(scores, pairs.region_lengths, image, image_global, part, words, caption_global)[:, 0]


def _by_regions(scores, region_lengths, image, image_global, part, *more) -> Tensor:
    """scores(image, image_global, part, *more), of images with the same number of regions at a time."""
    if region_lengths is None:
        return scores(image, image_global, part, *more)
    order, found = [], []
    for n in region_lengths.unique().tolist():
        own = (region_lengths == n).nonzero().flatten()
        found.append(scores(image[own, :n], image_global[own], part[own, :n], *(x[own] for x in more)))
        order.append(own)
    return torch.cat(found)[torch.cat(order).argsort()]


def _in_one_pass(cu_seqlens, region_lengths, *tensors: Tensor) -> Tensor:
    """All scores [I, T] by csrc/cpu/confidence_matching.cpp, which has no gradients."""
    layers = "global", "word", "region", "part", "common", "norm", "score"
    graphs = (f"{of}_{name}" for of in ("word", "region") for name in ("query", "key", "value"))
    names = [f"{layer}_{what}" for layer in (*layers, *graphs) for what in ("weight", "bias")]
    names = ["image", "image_global", "part", "words", "caption_global", *names]
    given = dict(zip(names, tensors, strict=True))
    for name in ("common_weight", "score_weight"):
        given[name] = given[name].flatten()
    return cpu_score(CONFIDENCE_MATCHING, cu_seqlens=cu_seqlens, region_lengths=region_lengths, **given)


class CMCAN(SGRAF):
    """Cross-modal confidence-aware network: SGRAF's encoders, `ConfidenceMatching`, loss and optimizer.

    Args:
        opt: the published options; `opt.device` and `opt.num_region` are optional.

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = CMCAN(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4, sim_dim=4,
    ...     self_layers=3))
    >>> len(model.state_dict())
    5
    """

    parts = ("img_enc", "txt_enc", "sim_embt", "sim_embv", "sim_reason")
    options = ("sim_dim", "self_layers")

    @classmethod
    def scorer_options(cls, options: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Without `smooth` and `num_partial`, which have one value in the published code."""
        for name, only in (("smooth", SMOOTH), ("num_partial", PARTIAL)):
            if options.get(name, only) != only:
                raise ValueError(f"{NAME}: {name} must be {only:g}, as in the published code, got {options[name]}")
        return {name: value for name, value in options.items() if name not in ("smooth", "num_partial")}

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """The pair scorer that the options describe."""
        return ConfidenceMatching(opt.embed_size, opt.sim_dim, opt.self_layers, getattr(opt, "num_region", 36))

    @property
    def sim_embt(self) -> nn.Module:
        return self.sim_enc.get_submodule("sim_embt")

    @property
    def sim_embv(self) -> nn.Module:
        return self.sim_enc.get_submodule("sim_embv")

    @property
    def sim_reason(self) -> nn.Module:
        """What the published object calls `sim_enc`."""
        return self.sim_enc.get_submodule("sim_enc")
