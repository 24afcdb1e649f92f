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
from ._proof import Disagrees, Fails, agreed, difference, published, with_gradients

Function = Callable[..., Any]


class Known(NamedTuple):
    """A published function that takes (images, captions, lengths, opt), where further parameters have a default.

    Attributes:
        ours: does the same.
        options: the `opt`s with which both are tried.
        third: the name of its third parameter.
        arrays: it takes and returns arrays of NumPy, and has no gradients.
        moves: the options that a call changes.
    """

    ours: Function
    options: Sequence[dict[str, Any]]
    third: str = "cap_lens"
    arrays: bool = False
    moves: tuple[str, ...] = ()


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
    "xattn_score": (Known(bfan.xattn_score, _BFAN), Known(naaf.xattn_score, [_NAAF], moves=naaf.LEARNED)),
    "xattn_score_test": (Known(naaf.xattn_score_test, [_NAAF]),),
}
RECALLS = {"i2t": i2t, "t2i": t2i}
NAMES = (*FUNCTIONS, *RECALLS)
_USUAL = {"per_captions": 5, "img_div": 5, "mode": "coco"}  # what i2t and t2i, where they take it, must be given
_RECALL = ("images", "captions", "caplens", "sims", "npts", "return_ranks", *_USUAL)
_LENGTHS = [5, 4, 3, 2]  # descending, and no single word, on which the published cosine fails
_MATCHED = 22  # captions of ten words, more than the 200 from which NAAF's thresholds move


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
            return known.ours, _proved(known, original)
        except (Disagrees, Fails) as error:
            refused = error if isinstance(error, Disagrees) or not str(refused) else refused
    raise refused


def _proved(known: Known, original: Function) -> float:
    _check(original, ("images", "captions", known.third, "opt"))
    torch.manual_seed(0)
    if known.moves:  # caption t tells of image t, so that it scores highest
        image = nn.functional.normalize(torch.randn(_MATCHED, 6, 8), dim=2)
        words = image[:, torch.arange(10) % 6] + 0.1 * torch.randn(_MATCHED, 10, 8)
        caption, lengths = nn.functional.normalize(words, dim=2), [10] * _MATCHED
    else:
        image = nn.functional.normalize(torch.randn(3, 6, 8), dim=2)
        caption, lengths = nn.functional.normalize(torch.randn(4, 5, 8), dim=2), _LENGTHS
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
        largest = max(largest, agreed(difference(expected, run(known.ours))))
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
        count = len(given["sims"]) if given.get("npts") is None else given["npts"]
        return ours(range(count), None, None, given["sims"], None, given["return_ranks"])

    rng = np.random.default_rng(0)
    sims = rng.permutation(7 * 35).reshape(7, 35) / 245.0 + np.kron(np.eye(7), np.full(5, 0.2))  # no two scores equal
    tried = {"images": np.zeros((7, 2, 2)), "sims": sims, "captions": None, "caplens": None, **_USUAL}
    if "images" not in takes.parameters:
        tried["npts"] = 7
    tried = {key: value for key, value in tried.items() if key in takes.parameters}
    expected = published(lambda: original(**tried))
    apart = agreed(difference(expected, new(**tried)))
    try:
        expected = published(lambda: original(**tried, return_ranks=True))
        apart = max(apart, agreed(difference(expected, new(**tried, return_ranks=True))))
    except Disagrees:
        with_ranks = False
    return new, apart


def loss(cls: type[nn.Module], module: ModuleType) -> tuple[Function, float]:
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

    def make(hardest: bool) -> Any:
        opt.max_violation = hardest
        with_opt = "opt" in inspect.signature(cls).parameters
        return cls(*[opt] * with_opt, margin=0.2, max_violation=hardest)

    arguments: tuple[Any, ...]
    if takes in (("self", "scores"), ("self", "sims"), ("self", "scores", "length")):
        inputs, arguments = [score], (score, *[len(score)] * (len(takes) - 2))

        def forward(self, *args, **kwargs):
            scores, *_ = (*args, *kwargs.values())
            return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)

    elif takes == ("self", "im", "s", "s_l"):
        inputs, arguments = [image, caption], (image, caption, _LENGTHS)

        def forward(self, im, s, s_l):  # type: ignore[misc]
            own = "xattn_score" if hasattr(module, "xattn_score") else f"xattn_score_{self.opt.cross_attn}"
            scores = getattr(module, own)(im, s, s_l, self.opt)
            return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)

    else:
        said = ", ".join(takes[1:])
        raise Disagrees(f"its forward takes ({said}), known are (scores), (sims), (scores, length) and (im, s, s_l)")
    apart = 0.0
    for hardest in (False, True):
        made = published(lambda: make(hardest))  # noqa: B023
        expected = published(lambda: with_gradients(lambda: made(*arguments), inputs))  # noqa: B023
        apart = max(apart, agreed(difference(expected, with_gradients(lambda: forward(made, *arguments), inputs))))  # noqa: B023
    return forward, apart
