"""The published functions and losses that `patch` knows, with the problems on which replacements are proved."""

from __future__ import annotations

import inspect
import itertools
from argparse import Namespace
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models import scan
from ..models._recall import i2t, t2i
from ..ops import hardest_negative_loss
from ._proof import Disagrees, Fails, agreed, difference, published, with_gradients

Function = Callable[..., Any]
SCORES = {"xattn_score_t2i": scan.xattn_score_t2i, "xattn_score_i2t": scan.xattn_score_i2t}
SHARDS = {"shard_xattn_t2i": scan.shard_xattn_t2i, "shard_xattn_i2t": scan.shard_xattn_i2t}
RECALLS = {"i2t": i2t, "t2i": t2i}
# Parameters of the published definitions; further ones with a default may follow.
SIGNATURES = {
    **dict.fromkeys(SCORES, ("images", "captions", "cap_lens", "opt")),
    **dict.fromkeys(SHARDS, ("images", "captions", "caplens", "opt")),
    **dict.fromkeys(RECALLS, ("images", "captions", "caplens", "sims")),
}
_COUNTED = ("npts", "sims", "per_captions", "return_ranks")  # i2t and t2i of the forks for noisy pairs
_LENGTHS = [5, 4, 3, 2]  # descending, and no single word, on which the published cosine fails


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
    _check(original, SIGNATURES[name])
    torch.manual_seed(0)
    image = nn.functional.normalize(torch.randn(3, 6, 8), dim=2).requires_grad_()
    caption = nn.functional.normalize(torch.randn(4, 5, 8), dim=2).requires_grad_()
    arrays = image.detach().numpy(), caption.detach().numpy()
    largest, failed = -1.0, Fails("")
    for norm, pool in itertools.product(scan.NORMS, scan.POOLS):
        opt = Namespace(raw_feature_norm=norm, agg_func=pool, lambda_softmax=9.0, lambda_lse=6.0, device="cpu")
        if name in SCORES:
            run = lambda function: with_gradients(lambda: function(image, caption, _LENGTHS, opt), [image, caption])  # noqa: B023, E731
        else:
            run = lambda function: function(*arrays, _LENGTHS, opt)  # noqa: B023, E731
        try:
            expected = published(lambda: run(original))  # noqa: B023
        except Fails as error:  # as with the published l1 norms
            failed = error
            continue
        ours = SCORES.get(name) or SHARDS[name]
        largest = max(largest, agreed(difference(expected, run(ours))))
    if largest < 0:
        raise failed
    return SCORES.get(name) or SHARDS[name], largest


def _check(function: Function, names: tuple[str, ...]) -> None:
    found = list(inspect.signature(function).parameters.values())
    more = [p.name for p in found[len(names) :] if p.default is p.empty]
    if tuple(p.name for p in found[: len(names)]) != names or more:
        raise Disagrees(f"it takes ({', '.join(p.name for p in found)}), known is ({', '.join(names)})")


def _recall(name: str, original: Function) -> tuple[Function, float]:
    """`i2t` or `t2i` in either published form."""
    counted = tuple(inspect.signature(original).parameters) == _COUNTED
    if not counted:
        _check(original, SIGNATURES[name])
    ours = RECALLS[name]
    rng = np.random.default_rng(0)
    sims = rng.permutation(7 * 35).reshape(7, 35) / 245.0 + np.kron(np.eye(7), np.full(5, 0.2))  # no two scores equal

    def by_count(npts, sims, per_captions=1, return_ranks=False):
        if return_ranks or per_captions != 5:  # it returns the order of all items, which `patch` does not make
            return original(npts, sims, per_captions, return_ranks)
        return ours(range(npts), None, None, sims)

    if counted:
        expected = published(lambda: original(7, sims, 5))
        return by_count, agreed(difference(expected, by_count(7, sims, 5)))
    images = np.zeros((7, 2, 2))

    def by_images(images, captions, caplens, sims, npts=None, return_ranks=False, **more):
        if more.get("img_div", 5) != 5:
            return original(images, captions, caplens, sims, npts, return_ranks, **more)
        return ours(images if images is not None else range(len(sims)), captions, caplens, sims, npts, return_ranks)

    apart = 0.0
    for ranks in (False, True):
        expected = published(lambda: original(images, None, None, sims, return_ranks=ranks))  # noqa: B023
        apart = max(apart, agreed(difference(expected, by_images(images, None, None, sims, return_ranks=ranks))))
    return by_images, apart


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
        raw_feature_norm="clipped_l2norm", agg_func="LogSumExp", lambda_softmax=9.0, lambda_lse=6.0, cross_attn="t2i"
    )
    if takes == ("self", "scores"):
        make, inputs = (lambda hardest: cls(margin=0.2, max_violation=hardest)), [score]
        arguments: tuple[Any, ...] = (score,)

        def forward(self, scores):
            return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)

    elif takes == ("self", "im", "s", "s_l"):
        make, inputs = (lambda hardest: cls(opt, margin=0.2, max_violation=hardest)), [image, caption]
        arguments = (image, caption, _LENGTHS)

        def forward(self, im, s, s_l):  # type: ignore[misc]
            scores = getattr(module, f"xattn_score_{self.opt.cross_attn}")(im, s, s_l, self.opt)
            return hardest_negative_loss(scores, margin=self.margin, hardest=self.max_violation)

    else:
        raise Disagrees(f"its forward takes ({', '.join(takes[1:])}), known are (scores) and (im, s, s_l)")
    apart = 0.0
    for hardest in (False, True):
        made = published(lambda: make(hardest))  # noqa: B023
        expected = published(lambda: with_gradients(lambda: made(*arguments), inputs))  # noqa: B023
        apart = max(apart, agreed(difference(expected, with_gradients(lambda: forward(made, *arguments), inputs))))  # noqa: B023
    return forward, apart
