"""The published functions and losses that `patch` knows, with the problems on which replacements are proved."""

from __future__ import annotations

import inspect
import itertools
from argparse import Namespace
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..models import bfan, naaf, scan
from ..models._recall import i2t, t2i
from ..ops import hardest_negative_loss
from ._proof import Disagrees, Fails, agreed, constructed, difference, published, replacing, with_gradients

Function = Callable[..., Any]


class Known(NamedTuple):
    """A published function that takes (images, captions, lengths, opt), where further parameters have a default.

    Attributes:
        ours: does the same.
        options: the `opt`s with which both are tried.
        third: the name of its third parameter.
        arrays: it takes and returns arrays of NumPy, and has no gradients.
        moves: the options that a call changes.
        matched: caption t must be that of image t; other calls stay with the published function.
    """

    ours: Function
    options: Sequence[dict[str, Any]]
    third: str = "cap_lens"
    arrays: bool = False
    moves: tuple[str, ...] = ()
    matched: bool = False


_SCAN = [
    {"raw_feature_norm": norm, "agg_func": pool, "lambda_softmax": 9.0, "lambda_lse": 6.0, "device": "cpu"}
    for norm, pool in itertools.product(scan.NORMS, scan.POOLS)
]
_BFAN = [{"focal_type": kind, "lambda_softmax": 20.0, "device": "cpu"} for kind in bfan.FOCAL]
_NAAF = {"lambda_softmax": 20.0, "thres": 0.1, "thres_safe": 0.15, "alpha": 2.0}
FUNCTIONS: dict[str, tuple[Known, ...]] = {
    "xattn_score_t2i": (Known(scan.xattn_score_t2i, _SCAN),),
    "xattn_score_i2t": (Known(scan.xattn_score_i2t, _SCAN),),
    "shard_xattn_t2i": (Known(scan.shard_xattn_t2i, _SCAN, "caplens", arrays=True),),
    "shard_xattn_i2t": (Known(scan.shard_xattn_i2t, _SCAN, "caplens", arrays=True),),
    "shard_xattn": (Known(bfan.shard_xattn, _BFAN, "caplens", arrays=True),),
    "xattn_score": (
        Known(bfan.xattn_score, _BFAN),
        Known(naaf.xattn_score, [_NAAF], moves=naaf.MOVED, matched=True),
    ),
    "xattn_score_test": (Known(naaf.xattn_score_test, [_NAAF], moves=("using_intra_info",)),),
}
RECALLS = {"i2t": i2t, "t2i": t2i}
NAMES = (*FUNCTIONS, *RECALLS)
_USUAL = {"per_captions": 5, "img_div": 5, "mode": "coco"}  # what i2t and t2i, where they take it, must be given
_RECALL = ("images", "im_len", "captions", "caplens", "sims", "npts", "return_ranks", *_USUAL)
_SIZES = ("shard_size",)  # parameters that change no result
_LENGTHS = [5, 4, 3, 2]  # descending; no single word, on which SCAN's cosine fails, and which NAAF averages over images
_MATCHED = [12] * 12 + [10] * 6 + [8] * 6  # more words than the 200 from which NAAF's thresholds move


def replacement(name: str, original: Function) -> tuple[Function, float]:
    """Make the replacement of a published function, and prove it.

    Returns:
        The replacement, and the largest difference.

    Raises:
        Disagrees: the results differ, or the function takes other arguments.
        Fails: the published function fails.
    """
    if name in RECALLS:
        return _recall(name, original)
    refused: Exception = Disagrees("")
    for known in FUNCTIONS[name]:
        try:
            apart = _proved(known, original)
            return _as_called(known, original), apart
        except (Disagrees, Fails) as error:
            refused = error if isinstance(error, Disagrees) or not str(refused) else refused
    raise refused


def _as_called(known: Known, original: Function) -> Function:
    """Our function for calls like the proof's, and the published one for others."""
    takes = inspect.signature(original)
    further = {p.name: p.default for p in list(takes.parameters.values())[4:] if p.name not in _SIZES}

    def new(*args: Any, **kwargs: Any) -> Any:
        given = takes.bind(*args, **kwargs).arguments
        images, captions, *rest = (given[name] for name in list(takes.parameters)[:4])
        usual = all(given.get(name, default) is default for name, default in further.items())
        if not usual or (known.matched and len(images) != len(captions)):
            return original(*args, **kwargs)
        return known.ours(images, captions, *rest)

    new.__doc__ = known.ours.__doc__
    return new


def _proved(known: Known, original: Function) -> float:
    _check(original, ("images", "captions", known.third, "opt"))
    torch.manual_seed(0)
    if known.matched:  # caption t tells of image t, so that it scores highest
        lengths = _MATCHED
        image = nn.functional.normalize(torch.randn(len(lengths), 6, 8), dim=2)
        words = image[:, torch.arange(12) % 6] + 0.1 * torch.randn(len(lengths), 12, 8)
    else:
        lengths = _LENGTHS
        image, words = nn.functional.normalize(torch.randn(3, 6, 8), dim=2), torch.randn(4, 5, 8)
    caption = nn.functional.normalize(words, dim=2)
    for row, length in zip(caption, lengths, strict=True):
        row[length:] = 1000.0  # padding, which no score may depend on
    inputs = [image.requires_grad_(), caption.requires_grad_()]
    largest, failed = -1.0, Fails("")
    for options in known.options:

        def run(function: Function, options: dict[str, Any] = options) -> list[Any]:
            opt = Namespace(**options)
            if known.arrays:
                return [function(*(x.detach().numpy() for x in inputs), lengths, opt)]
            found = with_gradients(lambda: function(*inputs, lengths, opt), inputs)
            return [*found, *(getattr(opt, name) for name in known.moves)]

        try:
            expected = published(lambda: run(original))
        except Fails as error:  # as with the published l1 norms
            failed = error
            continue
        largest = max(largest, agreed(difference(expected, replacing(lambda: run(known.ours)))))
    if largest < 0:
        raise failed
    return largest


def _check(function: Function, names: tuple[str, ...]) -> None:
    found = list(inspect.signature(function).parameters.values())
    more = [p.name for p in found[len(names) :] if p.default is p.empty]
    if tuple(p.name for p in found[: len(names)]) != names or more:
        raise Disagrees(f"it takes ({', '.join(p.name for p in found)}), known is ({', '.join(names)})")


def _recall(name: str, original: Function) -> tuple[Function, float]:
    """`i2t` or `t2i` in any published form."""
    takes, ours = inspect.signature(original), RECALLS[name]
    if not {"sims", "return_ranks"} <= set(takes.parameters) <= set(_RECALL):
        raise Disagrees(f"it takes ({', '.join(takes.parameters)}), known are only {', '.join(_RECALL)}")
    with_ranks = True  # some forms return other things as ranks, which stay as they are

    def new(*args: Any, **kwargs: Any) -> Any:
        bound = takes.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        usual = all(given.get(key, value) == value for key, value in _USUAL.items())
        if not usual or (given["return_ranks"] and not with_ranks):
            return original(*args, **kwargs)
        sims, images, count = given["sims"], given.get("images"), given.get("im_len", given.get("npts"))
        count = len(images) if images is not None else len(sims) if count is None else count
        if np.shape(sims) != (count, 5 * count) or not np.isfinite(sims).all():
            return original(*args, **kwargs)
        return ours(range(count), None, None, sims, None, given["return_ranks"])

    rng = np.random.default_rng(0)
    sims = rng.permutation(7 * 35).reshape(7, 35) / 245.0 + np.kron(np.eye(7), np.full(5, 0.2))  # no two scores equal
    tried = {"images": np.zeros((7, 2, 2)), "sims": sims, "captions": None, "caplens": None, **_USUAL}
    if "images" not in takes.parameters:
        tried |= {"im_len": 7, "npts": 7}
    tried = {key: value for key, value in tried.items() if key in takes.parameters}
    expected = published(lambda: original(**tried))
    apart = agreed(difference(expected, replacing(lambda: new(**tried))))
    try:
        expected = published(lambda: original(**tried, return_ranks=True))
        apart = max(apart, agreed(difference(expected, replacing(lambda: new(**tried, return_ranks=True)))))
    except Disagrees:
        with_ranks = False
    return new, apart


def loss(cls: Any, module: ModuleType) -> tuple[Function, float]:
    """Make the `forward` of a published ContrastiveLoss, of scores (SGRAF) or of embeddings (SCAN), and prove it.

    Args:
        cls: the class.
        module: the module that defines it; SCAN's loss calls this module's `xattn_score_*`.

    Returns:
        The replacement of `forward`, and the largest difference.

    Raises:
        Disagrees: the results differ, or the class takes other arguments.
        Fails: the published class fails.
    """
    takes = tuple(inspect.signature(cls.forward).parameters)
    torch.manual_seed(0)
    score = torch.rand(6, 6).requires_grad_()
    image = nn.functional.normalize(torch.randn(4, 6, 8), dim=2).requires_grad_()
    caption = nn.functional.normalize(torch.randn(4, 5, 8), dim=2).requires_grad_()
    opt = Namespace(
        **{**_SCAN[0], **_BFAN[0], "raw_feature_norm": "clipped_l2norm", "cross_attn": "t2i", "margin": 0.2}
    )

    original, binds = cls.forward, inspect.signature(cls.forward).bind
    arguments: tuple[Any, ...]
    if takes in (("self", "scores"), ("self", "sims"), ("self", "scores", "length")):
        inputs, arguments = [score], (score, *[len(score)] * (len(takes) - 2))

        def scores_of(self: Any, given: dict[str, Any]) -> Any:
            return given[takes[1]]

    elif takes == ("self", "im", "s", "s_l"):
        inputs, arguments = [image, caption], (image, caption, _LENGTHS)

        def scores_of(self: Any, given: dict[str, Any]) -> Any:
            own = "xattn_score" if hasattr(module, "xattn_score") else f"xattn_score_{self.opt.cross_attn}"
            return getattr(module, own)(given["im"], given["s"], given["s_l"], self.opt)

    else:
        said = ", ".join(takes[1:])
        raise Disagrees(f"its forward takes ({said}), known are (scores), (sims), (scores, length) and (im, s, s_l)")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is not cls:  # it may override what the published forward calls
            return original(self, *args, **kwargs)
        scores = scores_of(self, binds(self, *args, **kwargs).arguments)
        return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)

    apart = 0.0
    for hardest in (False, True):
        opt.max_violation = hardest
        with_opt = [opt] * ("opt" in inspect.signature(cls).parameters)
        made: Any = constructed(cls, *with_opt, margin=0.2, max_violation=hardest)
        expected = published(lambda: with_gradients(lambda: made(*arguments), inputs))  # noqa: B023
        found = replacing(lambda: with_gradients(lambda: forward(made, *arguments), inputs))  # noqa: B023
        apart = max(apart, agreed(difference(expected, found)))
    return forward, apart
