"""RCAR (Diao et al., IEEE TIP 2023): regulated cross-attention, after Paranioar/RCAR's code.

For one pair, with queries q and contexts x of the direction, channel weights M and temperature c of each query:

    u     = l2norm(attention of M q over x at temperature c),   M = 1 and c = smooth at first   (1)
    s_j^k = l2norm(W_k (q_j - u_j)^2 + b_k)                                                     (2)
    M    <- clamp(tanh(B tanh(A s)) + M, -1, 1),   c <- relu(F tanh(E s) + c)                   (3)
    w     = softmax over the queries of v . (tanh(K s_j) o tanh(Q g)),   g <- l2norm(sum w s)    (4)

`coop_rcar`, n steps: (1), (2), (3) but not in the last step, (4), with g = the mean of s at first. `only_rar`: (1) and
(2) once, (4) n times. Both end in S = sigmoid(w_e . g + b_e). `only_rcr`: (1) to (3) n times, then S = the mean of
cos(q, u) with u of (1).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._share import share
from ..nn import Attention, PairScorer, State, xavier_
from ..ops import _recompute, attended_vectors, cross_attention_similarity
from ..ops._calls import REGULATED_MATCHING, REGULATORS
from ..ops._cpu_calls import score as cpu_score
from ..packing import bounds, region_counts
from . import _by_caption
from ._common import Dropout, PaddedScorer, choice, encode_text, l2norm, without_padding
from ._inputs import ImageEncoder
from ._pair_blocks import Joined, Pairs, attended_of_pairs, blocks, matched
from ._regulators import AggregationRegulator, AlignmentVector, CorrespondenceRegulator, aligned, regulated
from ._rows import apart
from ._self_attention import normalised
from ._sgraf_attention import pair_attention
from .scan import EncoderText as _EncoderText
from .sgraf import SGRAF

NAME = "RegulatedMatching"
DIRECTIONS = ("t2i", "i2t")
SMOOTH = {"t2i": 10.0, "i2t": 3.0}


class MLP(nn.Module):
    """Linear, BatchNorm over all rows, ReLU, Linear. The second BatchNorm is in published checkpoints, but unused."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        sizes = (input_dim, hidden_dim), (hidden_dim, output_dim)
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.bns = nn.ModuleList(nn.BatchNorm1d(size) for _, size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[0](x.flatten(0, -2))
        return self.layers[1](normalised(self.bns[0], hidden).relu()).view(*x.shape[:-1], -1)


class EncoderImage(ImageEncoder):
    """Linear plus `MLP`, and l2norm: features [B, R, F] -> [B, R, D], unit rows unless `no_imgnorm`."""

    def __init__(self, img_dim: int, embed_size: int, no_imgnorm: bool = False) -> None:
        super().__init__(img_dim)
        self.no_imgnorm = no_imgnorm
        self.fc = nn.Linear(img_dim, embed_size)
        self.mlp = MLP(img_dim, max(1, embed_size // 2), embed_size)
        xavier_(self.fc)

    def extra_repr(self) -> str:
        return f"no_imgnorm={self.no_imgnorm}"

    def forward(self, images: Tensor) -> Tensor:
        features = self.mlp(images) + self.fc(images)
        return features if self.no_imgnorm else l2norm(features, dim=-1)


class EncoderText(_EncoderText):
    """SCAN's text encoder with dropout 0.4: word ids [B, W] -> caption [B, longest, D]."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dropout = Dropout(0.4)

    def forward(self, x: Tensor, lengths) -> Tensor:  # type: ignore[override]
        return encode_text(self.dropout(self.embed(x)), lengths, self.rnn, self.no_txtnorm)[0]


class RegulatedMatching(PaddedScorer):
    """RCAR's pair scorer, (1) to (4).

    Args:
        embed_dim: D.
        sim_dim: S, at least 2.
        attn_type: "t2i" (words attend to regions) or "i2t".
        self_regulator: "coop_rcar", "only_rar" or "only_rcr".
        step: n.
        smooth: the first temperature; None: as published, 10 for t2i and 3 for i2t.

    Raises:
        ValueError: an option has an unknown value, or a number is out of its range.

    >>> scorer = RegulatedMatching(8, 4).eval()
    >>> scorer(torch.randn(2, 36, 8), torch.randn(3, 5, 8), [5, 2, 4]).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        embed_dim: int,
        sim_dim: int,
        attn_type: str = "t2i",
        self_regulator: str = "coop_rcar",
        step: int = 2,
        smooth: float | None = None,
    ) -> None:
        super().__init__()
        choice(NAME, "attn_type", attn_type, DIRECTIONS)
        choice(NAME, "self_regulator", self_regulator, REGULATORS)
        if step < 1 or sim_dim < 2:
            raise ValueError(f"{NAME}: step must be at least 1 and sim_dim at least 2, got {step} and {sim_dim}")
        self.attn_type, self.self_regulator, self.step = attn_type, self_regulator, int(step)
        self.smooth = SMOOTH[attn_type] if smooth is None else float(smooth)
        rar = 0 if self_regulator == "only_rcr" else step
        rcr = {"coop_rcar": step - 1, "only_rar": 0, "only_rcr": step}[self_regulator]
        alv = 1 if self_regulator == "only_rar" else step
        self.sim_eval_w = nn.Linear(sim_dim, 1)
        self.rar_modules = nn.ModuleList(AggregationRegulator(sim_dim) for _ in range(rar))
        self.rcr_modules = nn.ModuleList(CorrespondenceRegulator(sim_dim, embed_dim) for _ in range(rcr))
        self.alv_modules = nn.ModuleList(AlignmentVector(sim_dim, embed_dim) for _ in range(alv))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                xavier_(module)

    def extra_repr(self) -> str:
        names = "attn_type", "self_regulator", "step", "smooth"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @property
    def _drops(self) -> float:
        """The share that dropout sets to zero, now."""
        rates = {x.p if x.training else 0.0 for x in self.rar_modules.modules() if isinstance(x, nn.Dropout)}
        if len(rates) > 1:
            raise ValueError(
                f"{NAME}: all its Dropout modules must have one rate and be in one mode, training or evaluation, got "
                f"rates {sorted(rates)}, 0 in evaluation"
            )
        return rates.pop() if rates else 0.0

    def score(
        self,
        image_state: State,
        words: Tensor,
        cu_seqlens: Tensor,
        caption_state: State,
        region_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [I, T], in (0, 1) but for `only_rcr`, of the images and captions given.

        In training, dropout is drawn caption by caption for all images, as in the published loop.
        """
        (image,) = image_state
        names, parameters = zip(*self.named_parameters(), strict=True)
        R, D = image.shape[1:]
        tensors = image, words, *parameters
        bounds(cu_seqlens, len(words), NAME)
        region_counts(region_lengths, image, NAME)

        def pair_bytes(length: int) -> int:
            queries, S = length if self.attn_type == "t2i" else R, self.sim_eval_w.in_features
            return queries * 4 * ((6 + self.step) * D + 2 * self.step * S)

        queries = len(words) if self.attn_type == "t2i" else (len(cu_seqlens) - 1) * R
        # About what autograd records: 9 was fitted to the bytes that hooks for saved tensors see.
        numbers = 9 * self.step * len(image) * queries * (D + R + self.sim_eval_w.in_features)
        drops = self._drops
        whole = partial(self._in_one_pass, drops, names) if self._in_cpp(*tensors) else None
        run, pairs = partial(self._block, drops, names), partial(self._pairs, drops, names)
        if drops:
            shape = partial(self._kept_shape, R)
            draw = partial(self._draw, drops, share(), len(image), R, image.dtype, image.device)
            scorer = _by_caption.Scorer(shape, draw, run, pairs, pair_bytes, whole)
            return _by_caption.score(scorer, image, words, cu_seqlens, region_lengths, parameters, numbers)

        def cut(backward: bool, *args: Tensor) -> Iterator[_recompute.Block]:
            if backward or whole is None:
                yield from blocks(NAME, axes, pair_bytes, partial(_without_dropout, run), backward, *args, joined=True)
            else:
                yield _recompute.Block(((),) * len(axes), (), partial(whole, None, *args[-2:]))

        axes = "IN" + "." * len(parameters)
        few = partial(matched, axes, pair_bytes, lambda at, *given: pairs(at, None, *given))
        return _recompute.score(cut, axes, tensors, cu_seqlens, region_lengths, (), few, numbers=numbers)

    def _kept_shape(self, R: int, length: int) -> tuple[int, int, int]:
        """Steps, rows and S of what dropout keeps of a pair: a row for each query, and one for the global vector."""
        queries = length if self.attn_type == "t2i" else R
        return len(self.rar_modules), queries + 1, self.sim_eval_w.in_features

    def _draw(self, drops: float, now, I: int, R: int, dtype: torch.dtype, device: torch.device, length: int) -> Tensor:
        """What dropout keeps of a caption with all images: bool [I, steps, queries + 1, S], keys and then the global.

        Of a batch divided among processes it is drawn for the images of all.
        """
        divided, (steps, all_rows, S) = now is not None and now.divided, self._kept_shape(R, length)
        count, drawn = len(now.lengths) if divided else I, []
        for _ in range(steps):
            for rows in (all_rows - 1, 1):
                ones = torch.ones(count, rows, S, dtype=dtype, device=device)
                drawn.append(F.dropout(ones, drops).ne(0))
        kept = torch.cat(drawn, 1).unflatten(1, (steps, all_rows))
        return now.of_rows(kept) if divided else kept

    def _in_cpp(self, *tensors: Tensor) -> bool:
        """Whether csrc/cpu/regulated_matching.cpp computes the scores; gradients are never its work."""
        with torch.no_grad():
            return apart(*tensors)

    def _in_one_pass(self, drops, names, kept, cu_seqlens, region_lengths, image, words, *parameters) -> Tensor:
        """All scores [I, T] by csrc/cpu/regulated_matching.cpp; `kept`: the bits of what dropout kept, or None."""
        S, D, weights = self.sim_eval_w.in_features, image.shape[2], dict(zip(names, parameters, strict=True))
        given: dict[str, Any] = {
            "score_weight": weights["sim_eval_w.weight"][0],
            "score_bias": weights["sim_eval_w.bias"],
        }
        for kind, modules, layer, *sizes in (
            ("align", "alv_modules", "sim_transform_w", S, D),
            ("key", "rar_modules", "rar_k_w.0", S, S),
            ("ask", "rar_modules", "rar_q_w.0", S, S),
            ("share", "rar_modules", "rar_v_w.0", S),
            ("matrix_in", "rcr_modules", "rcr_matrix_w.0", 2 * S, S),
            ("matrix_out", "rcr_modules", "rcr_matrix_w.2", D, 2 * S),
            ("smooth_in", "rcr_modules", "rcr_smooth_w.0", S // 2, S),
            ("smooth_out", "rcr_modules", "rcr_smooth_w.2", S // 2),
        ):
            steps = range(len(getattr(self, modules)))
            for what, shape in (("weight", sizes), ("bias", sizes[:-1])):
                of = [weights[f"{modules}.{k}.{layer}.{what}"].view(shape) for k in steps]
                given[f"{kind}_{what}"] = torch.stack(of) if of else image.new_empty(0, *shape)
        del given["share_bias"]  # the softmax does not change with it
        given |= {"direction": self.attn_type, "regulator": self.self_regulator, "scale": self.smooth}
        given |= {"kept": kept, "dropped": drops}
        return cpu_score(
            REGULATED_MATCHING, image=image, words=words, cu_seqlens=cu_seqlens, region_lengths=region_lengths, **given
        )

    def attention(self, image: Tensor, words: Tensor) -> Attention:
        """`regions` (t2i) or `words` (i2t) of the last step, all steps' under `regions_by_step` [K, W, R] or
        `words_by_step`, and the queries' weights in (4), `query_shares` [W] or [R]."""
        name, query, context = ("regions", words, image) if self.attn_type == "t2i" else ("words", image, words)
        only_rar, only_rcr = (self.self_regulator == each for each in ("only_rar", "only_rcr"))
        matrix, smooth = torch.ones_like(query), query.new_full((len(query),), self.smooth)
        steps: list[Tensor] = []
        share = overall = similar = query.new_empty(0)

        def attended() -> Tensor:
            steps.append(pair_attention(query * matrix, context, smooth[:, None]))
            return l2norm(steps[-1] @ context)

        alv: Any = self.alv_modules
        for k in range(self.step):
            if not (k and only_rar):
                similar = l2norm(alv[k].sim_transform_w((query - attended()).square()))
            overall = overall if k else similar.mean(0)
            if only_rcr or (not only_rar and k < self.step - 1):
                of: Any = self.rcr_modules[k]
                matrix = (of.rcr_matrix_w(similar).tanh() + matrix).clamp(-1, 1)
                smooth = (of.rcr_smooth_w(similar)[:, 0] + smooth).relu()
            if not only_rcr:
                of = self.rar_modules[k]
                share = of.rar_v_w(of.rar_k_w(similar) * of.rar_q_w(overall))[:, 0].softmax(0)
                overall = l2norm(share @ similar)
        score = F.cosine_similarity(query, attended()).mean() if only_rcr else self.sim_eval_w(overall).sigmoid()
        weights = {name: steps[-1], f"{name}_by_step": torch.stack(steps)}
        return Attention(float(score), weights if only_rcr else weights | {"query_shares": share})

    def _block(self, drops, names, of: Joined, cu_seqlens, region_lengths, kept, image, words, *parameters) -> Tensor:
        """Scores [b, c] of some images with some captions, one after another, as is what dropout kept."""
        valid = None
        if region_lengths is not None:
            image, valid = without_padding(image, region_lengths)
        options = {"direction": self.attn_type, "region_lengths": region_lengths}
        if self.attn_type == "t2i":
            padded, query, mask = of.padded, words[None], of.padded.real
        else:
            padded, query, mask = None, image[:, None], None if valid is None else valid[:, None]

        def attended(own: Tensor, smooth: Tensor) -> Tensor:
            return attended_vectors(image, words, cu_seqlens, own, scale=smooth, **options)

        def first(*align: Tensor) -> Tensor:
            return cross_attention_similarity(image, words, cu_seqlens, *align, scale=self.smooth, **options)

        if kept is not None:
            kept = kept.transpose(1, 2)  # [b, rows, steps, S]
            if padded is not None and padded.needed:
                kept = kept.index_select(1, padded.with_last().to(kept.device))
            kept = kept.unflatten(1, (len(of.captions), -1)).transpose(2, 3)
        weights, scheme = dict(zip(names, parameters, strict=True)), (self.self_regulator, self.step, self.smooth)
        return regulated(*scheme, drops, weights, query, mask, first, attended, kept, padded)

    def _pairs(self, drops, names, pairs: Pairs, kept, image, words, *parameters) -> Tensor:
        """As `_block`, [P] of P pairs, with an image and a caption for each."""
        valid, counts = None, pairs.region_lengths
        if counts is not None:
            image, valid = without_padding(image, counts)
        if self.attn_type == "t2i":
            context, query, valid = image, words, None
        else:
            context, query, counts = words, image, None

        def attended(own: Tensor, smooth: float | Tensor) -> Tensor:
            smooth = smooth if isinstance(smooth, float) else smooth.squeeze(1)
            return attended_of_pairs(context, counts, own.squeeze(1), scale=smooth).unsqueeze(1)

        def first(*align: Any) -> Tensor:
            return aligned(query.unsqueeze(1), attended(query.unsqueeze(1), self.smooth), align, mask)

        mask = None if valid is None else valid[:, None]
        kept = None if kept is None else kept.unsqueeze(1)
        weights, scheme = dict(zip(names, parameters, strict=True)), (self.self_regulator, self.step, self.smooth)
        return regulated(*scheme, drops, weights, query.unsqueeze(1), mask, first, attended, kept).squeeze(1)


def _without_dropout(run, of: Joined, cu_seqlens, region_lengths, *tensors: Tensor) -> Tensor:
    return run(of, cu_seqlens, region_lengths, None, *tensors)


class RCAR(SGRAF):
    """Regulated cross-attention: encoders, `RegulatedMatching`, loss and optimizer.

    Args:
        opt: the published options; `opt.device` is optional.

    Raises:
        ValueError: an option is missing or has an unknown value.

    >>> model = RCAR(Namespace(
    ...     grad_clip=2.0, img_dim=6, embed_size=8, no_imgnorm=False, vocab_size=9, word_dim=5, num_layers=1,
    ...     bi_gru=True, no_txtnorm=False, margin=0.2, max_violation=True, learning_rate=2e-4, sim_dim=4,
    ...     attn_type="t2i", self_regulator="coop_rcar", rcar_step=2, rar_step=3, rcr_step=2, t2i_smooth=10.0,
    ...     i2t_smooth=3.0))
    >>> model.sim_enc.step
    2
    """

    weighs_regions = False
    options = (
        "sim_dim", "attn_type", "self_regulator", "rcar_step", "rar_step", "rcr_step", "t2i_smooth", "i2t_smooth",
    )  # fmt: skip

    def image(self, opt: Namespace) -> nn.Module:
        return EncoderImage(opt.img_dim, opt.embed_size, opt.no_imgnorm)

    def text(self, opt: Namespace) -> nn.Module:
        return EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.bi_gru, opt.no_txtnorm)

    @classmethod
    def scorer_options(cls, options: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """`step` and `smooth`, as the pair scorer calls them, are options of the regulator and of the direction."""
        regulator = options.get("self_regulator", chosen["self_regulator"])
        choice(NAME, "self_regulator", regulator, REGULATORS)
        names = {"step": cls._step(regulator), "smooth": f"{chosen['attn_type']}_smooth"}
        return {names.get(name, name): value for name, value in options.items()}

    @staticmethod
    def _step(regulator: str) -> str:
        return f"{regulator.removeprefix('only_').removeprefix('coop_')}_step"

    @classmethod
    def similarity(cls, opt: Namespace) -> PairScorer:
        """The pair scorer that the options describe."""
        choice(NAME, "attn_type", opt.attn_type, DIRECTIONS)
        choice(NAME, "self_regulator", opt.self_regulator, REGULATORS)
        step = getattr(opt, cls._step(opt.self_regulator))
        smooth = getattr(opt, f"{opt.attn_type}_smooth")
        return RegulatedMatching(opt.embed_size, opt.sim_dim, opt.attn_type, opt.self_regulator, step, smooth)
