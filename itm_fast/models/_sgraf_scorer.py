"""SGRAF's pair scorer, with SGR or SAF.

What depends on one image or one caption alone is computed once (`GlobalVectors`); the ops score pairs in blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .._share import share
from .._workspace import GIB, scratch_bytes, workspace
from ..nn import Attention, SimilarityFilter, SimilarityGraph, State, xavier_
from ..ops import similarity_filter_score, similarity_graph_score, similarity_nodes
from ..ops._recompute import again
from ..packing import bounds
from ._common import choice
from ._self_attention import GlobalVectors
from ._sgraf_attention import similarity_attention

NAME = "EncoderSimilarity"
OUTPUTS = ("score", "logit", "z")
SMOOTH = 9.0  # hard-coded in the published code


class AttentionFiltration(SimilarityFilter):
    """SAF over the nodes of one caption.

    Args:
        sim_dim: S.

    >>> AttentionFiltration(8)(torch.rand(4, 13, 8)).shape
    torch.Size([4, 8])
    """

    def forward(self, sim_emb: Tensor) -> Tensor:  # type: ignore[override]
        """Nodes [B, M, S] of B images with one caption -> [B, S], unit rows."""
        cu_seqlens = torch.tensor([0, sim_emb.shape[1]], dtype=torch.int32, device=sim_emb.device)
        return super().forward(sim_emb, cu_seqlens)[:, 0]


class EncoderSimilarity(GlobalVectors):
    """Scores of all pairs from regions and words: SGR or SAF over similarity vectors (equations 1 to 9).

    Args:
        embed_size: D.
        sim_dim: S.
        module_name: "SGR" or "SAF". The published default "AVE" is refused, as it is there.
        sgr_step: K, for SGR; 0 scores the global similarity vector alone.
        num_region: R. The published code fixes 36.

    Attributes:
        output: "score"; "logit" for the number before the sigmoid, whose gradient stays finite where a score is rounded
            to 1.0; or "z" for the vectors [I, T, S] before the last layer, as MSCN's meta network takes them. Set it on
            the object, or in a subclass.

    Raises:
        ValueError: `module_name` is neither, or `output`, when pairs are scored, none of the three.

    >>> scorer = EncoderSimilarity(8, 4, "SAF").eval()
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    output = "score"

    def __init__(
        self, embed_size: int, sim_dim: int, module_name: str = "AVE", sgr_step: int = 3, num_region: int = 36
    ) -> None:
        choice(NAME, "module_name", module_name, ("SGR", "SAF"))
        super().__init__(embed_size, num_region)
        self.module_name = module_name
        self.all_images = module_name == "SAF"
        self.sim_tranloc_w = nn.Linear(embed_size, sim_dim)
        self.sim_tranglo_w = nn.Linear(embed_size, sim_dim)
        self.sim_eval_w = nn.Linear(sim_dim, 1)
        if module_name == "SGR":
            self.SGR_module = SimilarityGraph(sim_dim, sgr_step)
        else:
            self.SAF_module = AttentionFiltration(sim_dim)
        for linear in (self.sim_tranloc_w, self.sim_tranglo_w, self.sim_eval_w):
            xavier_(linear)

    def extra_repr(self) -> str:
        """Whether the results are no scores; `weights_checksum` includes it through `repr`."""
        return "" if self.output == "score" else f"output={self.output!r}"

    @property
    def sigmoid(self) -> Callable[[Tensor], Tensor]:
        """The last step, which methods of the published class call by this name; it has no parameters."""
        return torch.sigmoid

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores in (0, 1), [I, T], of the images and captions whose states are given; by `output`, logits or z.

        In training all images of the batch must come in one call: SAF's statistics are over all of them.
        """
        if self.output not in OUTPUTS:
            raise ValueError(f"{NAME}: output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        states = image_state, words, cu_seqlens, caption_state, region_lengths
        if self.output != "z" and self.module_name == "SGR" and len(self.SGR_module):
            return self._score_pairs(similarity_graph_score, self.SGR_module.stacked(), *states)
        if self.output != "z" and self.module_name == "SAF" and not self.SAF_module.bn.training:
            score = partial(similarity_filter_score, eps=self.SAF_module.bn.eps)
            return self._score_pairs(score, self.SAF_module.arguments(), *states)
        # One half of the scratch is for a block's nodes and their gradients, the other for the ops that run on them.
        limit = scratch_bytes(words.device) // 2
        with workspace(limit / GIB):
            return self._score_together(*states, limit)

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions`, `nodes` and, of SGR, `edges`: see `itm_fast.attention`."""
        return similarity_attention(self, SMOOTH, image, words)

    def _score_pairs(self, score, head, image_state, words, cu_seqlens, caption_state, region_lengths) -> Tensor:
        """Score with one op, for which all pairs are independent."""
        (image, image_global), (caption_global,) = image_state, caption_state
        local, overall, final = self.sim_tranloc_w, self.sim_tranglo_w, self.sim_eval_w
        return score(
            image, image_global, words, caption_global, cu_seqlens, local.weight, local.bias,
            overall.weight, overall.bias, *head, final.weight[0], final.bias,
            scale=SMOOTH, region_lengths=region_lengths, output=self.output,
        ).to(words.dtype)  # fmt: skip

    def _score_together(self, image_state, words, cu_seqlens, caption_state, region_lengths, limit) -> Tensor:
        """Score blocks of all images with some captions: in training, SAF's batch statistics are over all images."""
        (image, image_global), (caption_global,) = image_state, caption_state
        N, I, T = len(words), len(image), len(caption_global)
        row = 2 * max(I, 1) * self.sim_eval_w.in_features * words.element_size()
        most, run_block = limit // row, self._block
        if torch.is_grad_enabled() and most < N + T:
            run_block = again(self._block, words.device.type)
        edge, blocks, start = bounds(cu_seqlens, N, NAME), [], 0
        nodes = [stop + t for t, stop in enumerate(edge)]  # bounds of the captions' nodes
        while start < T:
            stop = max(start + 1, bisect_right(nodes, nodes[start] + most) - 1)
            part, at = words[edge[start] : edge[stop]], cu_seqlens[start : stop + 1] - edge[start]
            blocks.append(run_block(image, image_global, part, at, caption_global[start:stop], region_lengths))
            start = stop
        if not blocks:
            return words.new_empty((I, 0, self.sim_eval_w.in_features) if self.output == "z" else (I, 0))
        scores, means, variances = zip(*blocks, strict=True)
        if len(means[0]):
            found = torch.cat(means), torch.cat(variances), I * (cu_seqlens.diff() + 1)
            now = share()
            if now is not None and now.divided:
                found = now.whole(found[0]), now.whole(found[1]), now.whole(found[2])
            self.SAF_module.track(*found)
        return torch.cat(scores, 1)

    def _block(
        self, image, image_global, words, cu_seqlens, caption_global, region_lengths
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores or logits [I, T] or z [I, T, S], and in training SAF's mean and variance, each [T]."""
        local, overall = self.sim_tranloc_w, self.sim_tranglo_w
        nodes, node_edge = similarity_nodes(
            image, image_global, words, caption_global, cu_seqlens, local.weight, local.bias,
            overall.weight, overall.bias, scale=SMOOTH, region_lengths=region_lengths,
        )  # fmt: skip
        if self.module_name == "SGR":
            z = self.SGR_module(nodes, node_edge)
            mean = var = z.new_empty(0)
        else:
            z, mean, var = self.SAF_module.filtered(nodes, node_edge)
        if self.output == "z":
            return z.to(words.dtype), mean, var
        logit = self.sim_eval_w(z).squeeze(2)
        return (logit if self.output == "logit" else logit.sigmoid()).to(words.dtype), mean, var
