"""IMRAM (Chen et al., CVPR 2020): iterative matching with recurrent attention memory, after HuiChen24/IMRAM's code.

For one pair and the direction text (queries q the words, contexts x the regions; for image the other way round):

    P_k  = attention of q^{k-1} over x, inverse temperature lambda, clipped l2 norm             (1)
    s_k  = the mean over the queries of cos(q^0, P_k)                                           (2)
    o    = tanh(W_l [q^{k-1}; P_k] + b_l),   g = sigmoid(W_g [q^{k-1}; P_k] + b_g)               (3)
    q^k  = g q^{k-1} + (1 - g) o, scaled to unit length unless `no_IMRAM_norm`                  (4)
    S    = s_1 + ... + s_K; the mode full adds both directions, each with weights of its own    (5)

W [q; P] = W_q q + W_p P, and W_p P is the attended vector of W_p x, which is computed once per context. So a pair costs
only W_q q of the steps from the second on; the first is computed per query, and the last step's q is not used.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial, reduce

import torch
from torch import Tensor, nn

from .._names import Direction, Norm
from .._workspace import scratch_bytes
from ..nn import Attention, PairScorer, State, xavier_
from ..ops import _recompute, attended_vectors, cross_attention_score
from ..packing import spans, valid
from ._common import PaddedScorer, choice, cosine, encode_text, l2norm, without_padding
from ._inputs import ImageEncoder
from ._pair_blocks import attended_of_pairs, blocks, lengths, matched, mean_over_queries
from ._rows import cosines, gated, linear
from ._sgraf_attention import pair_attention
from .scan import EncoderText as _EncoderText
from .sgraf import SGRAF

NAME = "IterativeMatching"
MODES: dict[str, tuple[Direction, ...]] = {
    "text_IMRAM": ("t2i",),
    "image_IMRAM": ("i2t",),
    "full_IMRAM": ("t2i", "i2t"),
}
NORM: Norm = "clipped_l2norm"


class EncoderImage(ImageEncoder):
    """Linear `fc_local` and l2norm: features [B, R, F] -> [B, R, D], unit rows unless `no_imgnorm`."""

    def __init__(self, img_dim: int, embed_size: int, no_imgnorm: bool = False) -> None:
        super().__init__(img_dim)
        self.no_imgnorm = no_imgnorm
        self.fc_local = nn.Linear(img_dim, embed_size)
        xavier_(self.fc_local)

    def extra_repr(self) -> str:
        return f"no_imgnorm={self.no_imgnorm}"

    def forward(self, images: Tensor) -> Tensor:
        features = self.fc_local(images)
        return features if self.no_imgnorm else l2norm(features, dim=-1)


class EncoderText(_EncoderText):
    """SCAN's text encoder: word ids [B, W] -> caption [B, longest, D]."""

    def forward(self, x: Tensor, lengths) -> Tensor:  # type: ignore[override]
        return encode_text(self.embed(x), lengths, self.rnn, self.no_txtnorm)[0]


class IterativeMatching(PaddedScorer):
    """IMRAM's pair scorer, (1) to (5).

    Args:
        embed_size: D.
        model_mode: "text_IMRAM", "image_IMRAM" or "full_IMRAM". All modes have the weights of both directions.
        iteration_step: K. One step uses none of the parameters, as (3) and (4) prepare the next step.
        lambda_softmax: inverse temperature of the attention.
        no_IMRAM_norm: leave refined queries as the gate makes them.

    Raises:
        ValueError: `model_mode` is unknown, or `iteration_step` is less than 1.

    >>> scorer = IterativeMatching(8, "text_IMRAM")
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        embed_size: int,
        model_mode: str = "full_IMRAM",
        iteration_step: int = 3,
        lambda_softmax: float = 9.0,
        no_IMRAM_norm: bool = False,
    ) -> None:
        super().__init__()
        choice(NAME, "model_mode", model_mode, tuple(MODES))
        if iteration_step < 1:
            raise ValueError(f"{NAME}: iteration_step must be at least 1, got {iteration_step}")
        self.model_mode, self.iteration_step = model_mode, int(iteration_step)
        self.lambda_softmax, self.no_IMRAM_norm = float(lambda_softmax), bool(no_IMRAM_norm)
        for name in ("linear_t2i", "gate_t2i", "linear_i2t", "gate_i2t"):
            setattr(self, name, nn.Linear(2 * embed_size, embed_size))

    def extra_repr(self) -> str:
        options = "model_mode", "iteration_step", "lambda_softmax", "no_IMRAM_norm"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T], sums of K cosines for each direction, of the images and captions given."""
        (image,) = image_state
        found = []
        for direction in MODES[self.model_mode]:
            found += self.steps(direction, image, words, cu_seqlens, region_lengths)
        return reduce(torch.add, found)

    def steps(
        self,
        direction: Direction,
        image: Tensor,
        words: Tensor,
        cu_seqlens: Tensor,
        region_lengths: Tensor | None = None,
    ) -> list[Tensor]:
        """s_1, ..., s_K of all pairs in one direction, each [I, T]; image [I, R, D], packed words [N, D]."""
        # The first step needs no attended vector but for the second.
        first = cross_attention_score(
            image, words, cu_seqlens, direction=direction, affinity_norm=NORM, scale=self.lambda_softmax,
            pool="mean", region_lengths=region_lengths,
        )  # fmt: skip
        if self.iteration_step == 1:
            return [first]
        return [first, *self._later(direction, image, words, cu_seqlens, region_lengths).unbind(2)]

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions` and `words` of the last step, and of all steps, `regions_by_step` [K, W, R], `words_by_step`."""
        weights: dict[str, Tensor] = {}
        total = 0.0
        for direction in MODES[self.model_mode]:
            name, first, context = ("regions", words, image) if direction == "t2i" else ("words", image, words)
            update, gate = getattr(self, f"linear_{direction}"), getattr(self, f"gate_{direction}")
            query, steps = first, []
            for _ in range(self.iteration_step):
                steps.append(pair_attention(query, context, self.lambda_softmax))
                attended = steps[-1] @ context
                total += float(cosine(first, attended).mean())
                both = torch.cat([query, attended], 1)
                g = gate(both).sigmoid()
                query = g * query + (1 - g) * update(both).tanh()
                query = query if self.no_IMRAM_norm else l2norm(query)
            weights |= {name: steps[-1], f"{name}_by_step": torch.stack(steps)}
        return Attention(total, weights)

    def _later(self, direction: str, image, words, cu_seqlens, region_lengths) -> Tensor:
        """s_2, ..., s_K of all pairs, [I, T, K - 1]."""
        layers = getattr(self, f"linear_{direction}"), getattr(self, f"gate_{direction}")
        weight, bias = (torch.cat([getattr(x, name) for x in layers]) for name in ("weight", "bias"))
        (I, R, D), t2i = image.shape, direction == "t2i"
        of_query, of_attended = weight.split(D, 1)

        def pair_bytes(length: int) -> int:
            return (length if t2i else R) * D * 4 * 10

        axes = "IIN.." if t2i else "INN.."
        found, steps = [], self.iteration_step - 1
        # Mapped regions take as much memory as two images; those of some images are made at a time.
        for images in spans(I, max(1, scratch_bytes(image.device) // (16 * image[:1].nbytes or 1))):
            counts = None if region_lengths is None else region_lengths[images]
            some = image[images]
            if counts is not None:
                some, _ = without_padding(some, counts)
            mapped = linear(some if t2i else words, of_attended)
            tensors = (some, mapped, words) if t2i else (some, words, mapped)
            cut = partial(blocks, NAME, axes, pair_bytes, partial(self._block, direction))
            pairs = partial(matched, axes, pair_bytes, partial(self._pairs, direction))
            args = (*tensors, of_query, bias), cu_seqlens, counts, (steps,), pairs
            numbers = self._recorded(t2i, some, words, cu_seqlens, counts is not None)
            numbers += mapped.numel() + weight.numel() + bias.numel()
            found.append(_recompute.score(cut, axes, *args, numbers=numbers))
        return torch.cat(found) if found else image.new_empty(0, len(cu_seqlens) - 1, steps)

    def _recorded(self, t2i: bool, image: Tensor, words: Tensor, cu_seqlens: Tensor, padded: bool) -> int:
        """About how many numbers autograd records of what `_refined` calls; `padded`: some regions are not real."""
        (I, R, D), N, captions, steps = image.shape, len(words), len(cu_seqlens) - 1, self.iteration_step - 1
        # Of a query in each step: tanh(o), g, 1 - g, q^k before and after it is scaled, for i2t also ordered by caption
        # and, of padded images, cleared; P beside W_p P, but P alone at the end; and 6 lengths and factors.
        query = D * ((8 if t2i else 9 + padded) * steps - 2) + 6 * steps
        # Affinities before and after the norm and as weights, and 3 numbers of each norm.
        attention = 3 * R * (N + captions)
        # [x; W_p x] in all steps but the first and last, for t2i of all images in blocks of each length, where x (for
        # affinities) and what is attended are copied without padding; words, where a block gathers them.
        copies = 3 * (steps - 1) + (4 * steps + 1) * padded * t2i
        contexts = copies * (I * R * lengths(cu_seqlens, words, NAME) if t2i else N) + N
        return I * ((N if t2i else captions * R) * query + (steps + 1) * attention) + D * contexts

    def _block(self, direction, length, cu_seqlens, region_lengths, image, second, third, of_query, bias) -> Tensor:
        """A block of s_2, ..., s_K; `mapped` are the contexts x as W_p x of both layers."""
        mapped, words = (second, third) if direction == "t2i" else (third, second)
        context, first = (image, words) if direction == "t2i" else (words, image.unsqueeze(1))
        attend = partial(
            attended_vectors, image, words, cu_seqlens, direction=direction, affinity_norm=NORM,
            scale=self.lambda_softmax, region_lengths=region_lengths,
        )  # fmt: skip

        def mean(x: Tensor) -> Tensor:
            return mean_over_queries(x, length, direction, region_lengths)

        return self._refined(attend, mean, context, mapped, first, None, of_query, bias)

    def _pairs(self, direction, pairs, image, second, third, of_query, bias) -> Tensor:
        """As `_block`, [P, K - 1] of P pairs, with an image and a caption for each."""
        t2i, counts, real = direction == "t2i", pairs.region_lengths, None
        context, mapped, first = (image, second, third) if t2i else (second, third, image)
        if not t2i and counts is not None:
            counts, real = None, valid(pairs.region_lengths, image.shape[1])

        def attend(query: Tensor, values: Tensor) -> Tensor:
            query = query if real is None else query.masked_fill(~real[..., None], 0.0)
            return attended_of_pairs(context, counts, query, values, self.lambda_softmax, NORM)

        def mean(x: Tensor) -> Tensor:
            return x.mean(1) if real is None else x.masked_fill(~real, 0.0).sum(1) / real.sum(1)

        return self._refined(attend, mean, context, mapped, first, first, of_query, bias)

    def _refined(self, attend, mean, context, mapped, first, own, of_query, bias) -> Tensor:
        """s_2, ..., s_K from attend(queries, values) and the mean over a pair's queries; `own`: the first queries."""
        query: Tensor = first
        steps: list[Tensor] = []
        for step in range(1, self.iteration_step + 1):
            last = step == self.iteration_step
            values = [context] * (step > 1) + [mapped] * (not last)
            found = attend(own, torch.cat(values, -1) if len(values) > 1 else values[0])
            if step > 1:
                steps.append(mean(cosines(first, found)))
            if not last:
                product = linear(query, of_query, bias)
                own = query = gated(query, product, found, not self.no_IMRAM_norm)
        return torch.stack(steps, -1)


class IMRAM(SGRAF):
    """Iterative matching with recurrent attention memory: encoders, `IterativeMatching`, loss and optimizer.

    Args:
        opt: the published options; `opt.device` is optional.

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = IMRAM(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4,
    ...     model_mode="full_IMRAM", iteration_step=3, lambda_softmax=9.0, no_IMRAM_norm=False))
    >>> sorted(model.state_dict()[2])[:2]
    ['gate_i2t.bias', 'gate_i2t.weight']
    """

    weighs_regions = False
    scorer_without_name = True
    options = ("model_mode", "iteration_step", "lambda_softmax", "no_IMRAM_norm")

    def image(self, opt: Namespace) -> nn.Module:
        return EncoderImage(opt.img_dim, opt.embed_size, opt.no_imgnorm)

    def text(self, opt: Namespace) -> nn.Module:
        return EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.bi_gru, opt.no_txtnorm)

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """The pair scorer that the options describe."""
        return IterativeMatching(
            opt.embed_size, opt.model_mode, opt.iteration_step, opt.lambda_softmax, opt.no_IMRAM_norm
        )
