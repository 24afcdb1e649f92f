"""`EncoderSimilarity.forward` by the library's kernels, on the parameters of a repository's own class.

Two published classes have this name and take (img_emb, cap_emb, cap_lens): SGRAF's and its forks', and RCAR's.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import rcar
from ..models._common import PaddedScorer
from ..models.sgraf import EncoderSimilarity
from ._proof import Disagrees, Fails, agreed, constructed, difference, published, replacing, with_gradients

_D, _S, _R = 16, 8, 36
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TWINS: weakref.WeakKeyDictionary[nn.Module, tuple[object, PaddedScorer]] = weakref.WeakKeyDictionary()


class Returned(NamedTuple):
    """What the forks return, from the library's scorer with this `output`."""

    output: str
    form: Callable[[Tensor], Any]


RETURNS = {
    "scores": Returned("score", lambda score: score),
    "logits": Returned("logit", lambda logit: logit),
    "scores and their diagonal": Returned("score", lambda score: (score, score.detach().diagonal())),
}


class Family(NamedTuple):
    """One published class.

    Attributes:
        modes: the kinds of scorer that it can be.
        returns: what its forks return, keys of `RETURNS`.
        arguments: (mode, D, S) -> what a module of the mode is constructed with.
        mode: module -> its mode.
        options: module -> what else the library's scorer is built from; if this changes, it is built anew.
        ours: (module, options) -> the library's scorer.
    """

    modes: tuple[str, ...]
    returns: tuple[str, ...]
    arguments: Callable[[str, int, int], tuple[Any, ...]]
    mode: Callable[[Any], str]
    options: Callable[[Any], Any]
    ours: Callable[[Any, Any], Any]


def _sgraf_scorer(module: Any, options: object) -> PaddedScorer:
    if not hasattr(module, "v_global_w"):
        raise Unlike("it has no v_global_w")
    D, S = module.sim_tranloc_w.in_features, module.sim_tranloc_w.out_features
    regions = module.v_global_w.embedding_local[1].num_features
    return EncoderSimilarity(D, S, module.module_name, len(getattr(module, "SGR_module", ())), regions)


SGRAF = Family(
    ("SGR", "SAF"),
    tuple(RETURNS),
    lambda mode, D, S: (D, S, mode, 3),
    lambda module: str(module.module_name),
    lambda module: None,
    _sgraf_scorer,
)
_RCAR_MODES = {f"{way} {how}": (way, how) for way, how in itertools.product(rcar.DIRECTIONS, rcar.REGULATORS)}
_RCAR_OPTIONS = ("rcar_step", "rar_step", "rcr_step", "t2i_smooth", "i2t_smooth", "attn_type", "self_regulator")


def _rcar_options(mode: str) -> Namespace:
    return Namespace(**dict(zip(_RCAR_OPTIONS, (2, 2, 2, 10.0, 3.0, *_RCAR_MODES[mode]), strict=True)))


RCAR = Family(
    tuple(_RCAR_MODES),
    ("scores",),
    lambda mode, D, S: (_rcar_options(mode), D, S),
    lambda module: f"{module.opt.attn_type} {module.opt.self_regulator}",
    lambda module: [getattr(module.opt, name) for name in _RCAR_OPTIONS],
    lambda module, options: rcar.RCAR.similarity(
        Namespace(**dict(zip(_RCAR_OPTIONS, options, strict=True)), embed_size=module.embed_dim, sim_dim=module.sim_dim)
    ),
)


def family(cls: type[nn.Module]) -> Family:
    """Which published class this is, by what it is built from."""
    takes = inspect.signature(cls).parameters
    return RCAR if "opt" in takes and "module_name" not in takes else SGRAF


class Unlike(Disagrees):
    """The module lacks a parameter or buffer of the published one, or runs hooks inside."""


def _parameters(part: nn.Module) -> dict[str, Any]:
    """A module's own parameters. In the replicas of DataParallel they are tensors, which it keeps elsewhere."""
    replica = getattr(part, "_is_replica", False)
    return {**part._parameters, **(getattr(part, "_former_parameters", {}) if replica else {})}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    own = {name: _parameters(part) for name, part in module.named_modules()}
    return {f"{name}.{key}": x.shape for name, found in own.items() for key, x in found.items() if x is not None}


_WITH_CONSTANTS = (nn.Dropout, nn.BatchNorm1d, nn.LayerNorm)


def _constants(part: nn.Module) -> list[Any]:
    """What else such a module computes with."""
    return [getattr(part, name, None) for name in ("p", "eps", "momentum")]


def twin(known: Family, module: Any) -> PaddedScorer:
    """The library's scorer with this module's own parameters, buffers and modes.

    Raises:
        Unlike: there is none, as the module is built otherwise.
    """
    try:
        options = known.options(module)
        before, ours = _TWINS.get(module, (None, None))
        if ours is None or before != options:
            with torch.device("meta"):  # takes no memory and draws no random numbers
                ours = known.ours(module, options)
            _TWINS[module] = options, ours
    except (AttributeError, ValueError) as error:
        raise Unlike(str(error)) from error
    own = dict(module.named_modules())
    inside = [part for name, part in own.items() if name]
    if any(getattr(part, hooks) for part in inside for hooks in _HOOKS):
        raise Unlike("it has hooks inside")
    if _shapes(module) != _shapes(ours):
        raise Unlike("it has other parameters, or of other shapes")
    for name, part in ours.named_modules():
        try:
            source = own[name]
            if isinstance(part, _WITH_CONSTANTS) and _constants(part) != _constants(source):
                raise Unlike(f"{name} has another rate or constant")
            part.training = source.training
            # Linked at every call: moving a module to another device gives it new buffers.
            given = _parameters(source)
            part._parameters.update({key: given[key] for key in part._parameters})
            part._buffers.update({key: source._buffers[key] for key in part._buffers})
        except KeyError as error:
            raise Unlike(f"it has no {name}.{error.args[0]}") from error
    return ours


def forward(cls: type[nn.Module], returned: dict[str, str]) -> Callable[..., Any]:
    """A replacement of the published `forward`.

    Args:
        cls: the class that was proved; subclasses, and modules that are built otherwise, keep its own forward.
        returned: the modes that were proved -> a key of `RETURNS`.
    """
    original: Callable[..., Any] = cls.forward
    known = family(cls)

    def forward(self, img_emb, cap_emb, cap_lens):
        kind = returned.get(known.mode(self)) if type(self) is cls else None
        if kind is None:
            return original(self, img_emb, cap_emb, cap_lens)
        try:
            ours = twin(known, self)
        except Unlike:
            return original(self, img_emb, cap_emb, cap_lens)
        return _returned(ours, kind, img_emb, cap_emb, cap_lens)

    return forward


def _returned(scorer: PaddedScorer, kind: str, *batch: Any) -> Any:
    output, form = RETURNS[kind]
    if isinstance(scorer, EncoderSimilarity):
        scorer.output = output
    return form(scorer(*batch))


def prove(cls: type[nn.Module], mode: str) -> tuple[str, float]:
    """Compare the published class with the library's scorer, in evaluation and in training.

    Compared are scores, gradients of images, captions and all parameters, and the buffers after a step of training.

    Returns:
        What the class returns, a key of `RETURNS`; and the largest difference.

    Raises:
        Disagrees: the results differ.
        Fails: the published class fails.
    """
    torch.manual_seed(0)
    known = family(cls)
    module = constructed(cls, *known.arguments(mode, _D, _S))
    if not isinstance(module, nn.Module):
        raise Fails("it is no torch.nn.Module")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.4, 0.4)
    lengths = [6, 5, 4, 2]  # descending, as the published loader sorts them
    image = nn.functional.normalize(torch.randn(4, _R, _D), dim=2).requires_grad_()
    caption = nn.functional.normalize(torch.randn(4, 7, _D), dim=2).requires_grad_()
    inputs = [image, caption, *module.parameters()]
    refused = Disagrees("")
    for kind in known.returns:
        try:
            return kind, max(_apart(known, module, kind, training, inputs, lengths) for training in (False, True))
        except Disagrees as error:
            refused = min(refused, error, key=lambda each: not str(each).startswith("the results differ"))
    raise refused


def _apart(
    known: Family, module: nn.Module, kind: str, training: bool, inputs: Sequence[Tensor], lengths: list[int]
) -> float:
    """The largest difference between the module and the library's scorer that returns the same kind."""
    image, caption = inputs[:2]
    module.train(training)
    buffers = [buffer.clone() for buffer in module.buffers()]
    expected = published(lambda: _results(module, buffers, inputs, lambda: module(image, caption, lengths)))
    run = lambda: _returned(twin(known, module), kind, image, caption, lengths)  # noqa: E731
    found = replacing(lambda: _results(module, buffers, inputs, run))
    return agreed(difference(expected, found))


def _results(
    module: nn.Module, buffers: Sequence[Tensor], inputs: Sequence[Tensor], call: Callable[[], Any]
) -> list[Any]:
    """Scores, gradients and the buffers afterwards, from these buffers and one random state."""
    for buffer, start in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(start)
    torch.manual_seed(1)
    return [*with_gradients(call, inputs), *(buffer.clone() for buffer in module.buffers())]
