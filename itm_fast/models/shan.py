"""SHAN (Ji, Chen, Wang; IJCAI 2021): step-wise hierarchical alignment, complete as published.

The authors published no code. What the paper leaves open is an argument, whose default is chosen here:

- local cosines are averaged (`pooling="mean"`): the prose of equation 7 says so, the formula prints a sum;
- regions, words and their projections are unit vectors (`affinity="cosine"`), as a softmax with lambda 15 would be very
  sharp over unbounded products; `affinity="dot"` with `no_imgnorm` and `no_txtnorm` is equation 3 as printed;
- the gate of equation 8 is one number (`gate="scalar"`) or one for every dimension ("vector"), and each modality has
  its own, or both share one (`gate_sharing`);
- the projections of equation 3 have no bias, as printed, or one (`projection_bias`);
- a word is a fixed pretrained vector beside a learned one (`vector_dim` and `word_dim`, 300 each in the code of related
  models); without a file of pretrained vectors it is the learned one alone;
- encoders, optimizer and schedule are SCAN's.

The scores come from `itm_fast.hierarchical_alignment_score`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Attention, PairScorer, State
from ..ops import hierarchical_alignment_score
from ._catalogue import CATALOGUE
from ._common import PaddedScorer, choice, cosine, encode_text, l2norm, without_padding
from ._inputs import TextEncoder
from ._rows import linear
from .sgraf import SGRAF, EncoderImage

ALIGNMENTS = {"full": "both", "t2i": "t2i", "i2t": "i2t"}  # the paper's three models -> the op's direction
OPTIONS = CATALOGUE["shan"].options

__all__ = ["SHAN", "EncoderImage", "EncoderSimilarity", "EncoderText"]


class EncoderText(TextEncoder):
    """Fixed and learned word vectors side by side, (bi-)GRU, mean of the directions and l2norm (equation 2).

    Args:
        vocab_size: words.
        word_dim: size of a word's learned vector.
        vector_dim: size of its fixed vector, which `set_vectors` or a checkpoint fills; 0: it has none.
        embed_size: D.
        num_layers: of the GRU.
        use_bi_gru: both directions, as the paper has it.
        no_txtnorm: leave the rows as the GRU gives them.

    >>> encoder = EncoderText(9, 5, 3, 8)
    >>> encoder.set_vectors(torch.randn(9, 3))
    >>> encoder(torch.tensor([[1, 4, 2], [1, 2, 0]]), [3, 2]).shape
    torch.Size([2, 3, 8])
    """

    vectors: Tensor

    def __init__(
        self,
        vocab_size: int,
        word_dim: int,
        vector_dim: int,
        embed_size: int,
        num_layers: int = 1,
        use_bi_gru: bool = True,
        no_txtnorm: bool = False,
    ) -> None:
        super().__init__()
        self.no_txtnorm = no_txtnorm
        self.embed = nn.Embedding(vocab_size, word_dim)
        if vector_dim:
            self.register_buffer("vectors", torch.zeros(vocab_size, vector_dim))
        self.vector_dim = vector_dim
        self.rnn = nn.GRU(word_dim + vector_dim, embed_size, num_layers, batch_first=True, bidirectional=use_bi_gru)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def set_vectors(self, vectors: Tensor) -> None:
        """Fill the fixed vectors.

        Args:
            vectors: [vocab_size, vector_dim], as `itm_fast.data.load_word_vectors` gives them.

        Raises:
            ValueError: they have another shape, or the encoder has none.
        """
        want = [self.embed.num_embeddings, self.vector_dim]
        if list(vectors.shape) != want or not self.vector_dim:
            raise ValueError(
                f"SHAN: word vectors must be [vocab_size, vector_dim] = {want} with vector_dim > 0, "
                f"got {list(vectors.shape)}"
            )
        self.vectors.copy_(vectors)

    def forward(self, captions: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        """Word ids [B, W] int64 -> caption [B, longest, D], zeros beyond each length."""
        embedded = self.embed(captions)
        if self.vector_dim:
            embedded = torch.cat([self.vectors[captions], embedded], dim=2)
        return encode_text(embedded, lengths, self.rnn, self.no_txtnorm)[0]


class EncoderSimilarity(PaddedScorer):
    """Scores of all pairs from regions and words (equations 3 to 16).

    Args:
        embed_size: D.
        alignment: "full", or "t2i" (words attend to regions, the image is the mean of its regions) or "i2t".
        gate: "scalar" or "vector" (equation 8).
        gate_sharing: one gate for both modalities, for "full".
        affinity: "cosine" of the projected vectors, or "dot" (equation 3).
        pooling: "mean" or "sum" (equation 7).
        lambda_softmax: lambda (equations 4 and 5).
        mu1: share of the regions in the local term of "full" (equation 7).
        mu2: share of the image in the global-to-local term of "full" (equation 13).
        projection_bias: of equation 3.

    Raises:
        ValueError: an option is unknown.

    >>> scorer = EncoderSimilarity(8, "t2i", gate="vector")
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    per_word = 2

    def __init__(
        self,
        embed_size: int,
        alignment: str = "full",
        *,
        gate: str = "scalar",
        gate_sharing: bool = False,
        affinity: str = "cosine",
        pooling: str = "mean",
        lambda_softmax: float = 15.0,
        mu1: float = 0.3,
        mu2: float = 0.5,
        projection_bias: bool = False,
    ) -> None:
        super().__init__()
        choice("SHAN", "alignment", alignment, tuple(ALIGNMENTS))
        for name, value in (("gate", gate), ("affinity", affinity), ("pooling", pooling)):
            choice("SHAN", name, value, OPTIONS[name].choices)
        self.affinity, self.width = affinity, 1 if gate == "scalar" else embed_size
        self.options: dict[str, Any] = {
            "direction": ALIGNMENTS[alignment],
            "scale": lambda_softmax,
            "pool": pooling,
            "local_mix": mu1,
            "global_mix": mu2,
        }
        self.region_projection = nn.Linear(embed_size, embed_size, projection_bias)
        self.word_projection = nn.Linear(embed_size, embed_size, projection_bias)
        if alignment != "t2i":
            self.image_gate = nn.Linear(2 * embed_size, self.width)
            self.image_pool = nn.Linear(embed_size, 1, bias=False)  # a bias cancels in the softmax
        if alignment != "i2t":
            if alignment == "t2i" or not gate_sharing:
                self.caption_gate = nn.Linear(2 * embed_size, self.width)
            self.caption_pool = nn.Linear(embed_size, 1, bias=False)
        for part in self.children():
            assert isinstance(part, nn.Linear)
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self.options | {"affinity": self.affinity}).items())

    def image_state(self, image: Tensor, region_lengths: Tensor | None = None) -> State:
        """The image, its keys and its parts of the gates: [I, R, D] -> [I, R, D], [I, R, D], [I, R, 2, K]."""
        local = image
        if region_lengths is not None:
            local, _ = without_padding(image, region_lengths)
        gates = self._own(self._gate("image"), local), self._attended(self._gate("caption"), local)
        return image, self._key(self.region_projection, local), torch.stack(gates, -2)

    def caption_state(self, words: Tensor, cu_seqlens: Tensor) -> State:
        """The words' keys and parts of the gates: [N, D] -> [N, D], [N, 2, K]."""
        gates = self._attended(self._gate("image"), words), self._own(self._gate("caption"), words)
        return self._key(self.word_projection, words), torch.stack(gates, -2)

    def _gate(self, modality: str) -> nn.Linear | None:
        """The gate that fuses a modality's locals; None if the alignment does not use it."""
        if not hasattr(self, f"{modality}_pool"):
            return None
        return getattr(self, f"{modality}_gate", None) or self.image_gate

    def _own(self, gate: nn.Linear | None, x: Tensor) -> Tensor:
        """The part of a vector's gate that comes from the vector itself, with the bias."""
        if gate is None:
            return x.new_zeros(*x.shape[:-1], self.width)
        return linear(x, gate.weight[:, : x.shape[-1]], gate.bias)

    def _attended(self, gate: nn.Linear | None, x: Tensor) -> Tensor:
        """The part of a gate that an attended vector gives; being linear, it is computed once per vector."""
        if gate is None:
            return x.new_zeros(*x.shape[:-1], self.width)
        return linear(x, gate.weight[:, x.shape[-1] :])

    def _key(self, projection: nn.Linear, x: Tensor) -> Tensor:
        key = linear(x, projection.weight, projection.bias)
        return l2norm(key) if self.affinity == "cosine" else key

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T] of the images and captions whose states are given."""
        (image, image_key, image_gate), (word_key, word_gate) = image_state, caption_state
        image_pool, caption_pool = (
            getattr(self, name).weight[0] if hasattr(self, name) else words.new_zeros(words.shape[1])
            for name in ("image_pool", "caption_pool")
        )
        return hierarchical_alignment_score(
            image, image_key, image_gate, words, word_key, word_gate, cu_seqlens, image_pool, caption_pool,
            region_lengths=region_lengths, **self.options,
        ).to(words.dtype)  # fmt: skip

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions` and `words` (equations 4 and 5), and the share of each word and region in the caption's and the
        image's context vector, `word_pool` [W] and `region_pool` [R] (equation 9)."""
        cu_seqlens = torch.tensor([0, len(words)], dtype=torch.int32, device=words.device)
        _, keys, gates = (x[0] for x in self.image_state(image[None]))
        word_keys, word_gates = self.caption_state(words, cu_seqlens)
        affinity = self.options["scale"] * (keys @ word_keys.t())  # [R, W]
        weights: dict[str, Tensor] = {}
        local, overall, vectors = [], [], {"region": image.mean(0), "word": words.mean(0)}
        for side, alpha, mine, others, gate in (
            ("region", affinity.softmax(1), image, words, lambda alpha: gates[:, 0] + alpha @ word_gates[:, 0]),
            ("word", affinity.t().softmax(1), words, image, lambda alpha: word_gates[:, 1] + alpha @ gates[:, 1]),
        ):
            pool = getattr(self, {"region": "image_pool", "word": "caption_pool"}[side], None)
            if pool is None:
                continue
            attended, g = alpha @ others, gate(alpha).sigmoid()
            fused = g * mine + (1 - g) * attended
            share = (fused @ pool.weight[0]).softmax(0)
            context = share @ fused
            found = cosine(context, others).softmax(0) @ others
            r = cosine(mine, attended)
            local.append(r.mean() if self.options["pool"] == "mean" else r.sum())
            overall.append(cosine(context, found))
            vectors[side] = context + found
            weights |= {{"region": "words", "word": "regions"}[side]: alpha, f"{side}_pool": share}
        score = cosine(vectors["region"], vectors["word"])
        for terms, mix in ((local, self.options["local_mix"]), (overall, self.options["global_mix"])):
            score = score + (terms[0] if len(terms) == 1 else mix * terms[0] + (1 - mix) * terms[1])
        return Attention(float(score), weights)


class SHAN(SGRAF):
    """Step-wise hierarchical alignment network: encoders, scorer, loss and optimizer in one object.

    Args:
        opt: the options of SGRAF's encoders and training, those of `EncoderSimilarity`, and `vector_dim`, the size of a
            word's fixed vector; `opt.device` (default: CUDA if there is a GPU) is optional.

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = SHAN(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, vector_dim=0,
    ...     num_layers=1, bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4,
    ...     alignment="full", gate="scalar", gate_sharing=False, affinity="cosine", pooling="mean",
    ...     lambda_softmax=15.0, mu1=0.3, mu2=0.5, projection_bias=False))
    >>> ids = torch.tensor([[1, 4, 2], [1, 2, 0]])
    >>> model.forward_sim(*model.forward_emb(torch.randn(2, 36, 6), ids, [3, 2])).shape
    torch.Size([2, 2])
    """

    weighs_regions = False
    options = (
        "vector_dim", "alignment", "gate", "gate_sharing", "affinity", "pooling", "lambda_softmax", "mu1", "mu2",
        "projection_bias",
    )  # fmt: skip
    txt_enc: EncoderText

    def text(self, opt: Namespace) -> nn.Module:
        return EncoderText(
            opt.vocab_size, opt.word_dim, opt.vector_dim, opt.embed_size, opt.num_layers, opt.bi_gru, opt.no_txtnorm
        )

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        return EncoderSimilarity(opt.embed_size, **{name: getattr(opt, name) for name in cls.options[1:]})
