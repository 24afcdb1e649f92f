"""`EncoderSimilarity.forward` by the library's kernels, on the parameters of a repository's own class."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.sgraf import EncoderSimilarity
from ._proof import Disagrees, Fails, agreed, difference, published, with_gradients

MODES = ("SGR", "SAF")
_D, _S, _R = 16, 8, 36
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TWINS: weakref.WeakKeyDictionary[nn.Module, EncoderSimilarity] = weakref.WeakKeyDictionary()


class Returned(NamedTuple):
    """What the forks return, from the library's scorer with this `output`."""

    output: str
    form: Callable[[Tensor], Any]


RETURNS = {
    "scores": Returned("score", lambda score: score),
    "logits": Returned("logit", lambda logit: logit),
    "scores and their diagonal": Returned("score", lambda score: (score, score.detach().diagonal())),
}


class Unlike(Disagrees):
    """The module lacks a parameter or buffer of the published one, or runs hooks inside."""


def _parameters(part: nn.Module) -> dict[str, Any]:
    """A module's own parameters. In the replicas of DataParallel they are tensors, which it keeps elsewhere."""
    replica = getattr(part, "_is_replica", False)
    return {**part._parameters, **(getattr(part, "_former_parameters", {}) if replica else {})}


def _names(module: nn.Module) -> set[str]:
    own = {name: _parameters(part) for name, part in module.named_modules()}
    return {f"{name}.{key}" for name, found in own.items() for key, x in found.items() if x is not None}


def twin(module: Any) -> EncoderSimilarity:
    """The library's scorer with this module's own parameters, buffers and modes.

    Raises:
        Unlike: there is none, as the module is built otherwise.
    """
    ours = _TWINS.get(module)
    if ours is None and not hasattr(module, "v_global_w"):
        raise Unlike("it has no v_global_w")
    if ours is None:
        D, S = module.sim_tranloc_w.in_features, module.sim_tranloc_w.out_features
        regions = module.v_global_w.embedding_local[1].num_features
        with torch.device("meta"):  # takes no memory and draws no random numbers
            ours = EncoderSimilarity(D, S, module.module_name, len(getattr(module, "SGR_module", ())), regions)
        _TWINS[module] = ours
    own = dict(module.named_modules())
    inside = [part for name, part in own.items() if name]
    if any(getattr(part, hooks) for part in inside for hooks in _HOOKS):
        raise Unlike("it has hooks inside")
    if _names(module) != _names(ours):
        raise Unlike("it has other parameters")
    for name, part in ours.named_modules():
        try:
            source = own[name]
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
        returned: "SGR" and "SAF", where they were proved -> a key of `RETURNS`.
    """

    original: Callable[..., Any] = cls.forward

    def forward(self, img_emb, cap_emb, cap_lens):
        kind = returned.get(str(self.module_name)) if type(self) is cls else None
        if kind is None:
            return original(self, img_emb, cap_emb, cap_lens)
        try:
            ours = twin(self)
        except Unlike:
            return original(self, img_emb, cap_emb, cap_lens)
        return _returned(ours, kind, img_emb, cap_emb, cap_lens)

    return forward


def _returned(scorer: EncoderSimilarity, kind: str, *batch: Any) -> Any:
    scorer.output, form = RETURNS[kind]
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
    module = published(lambda: cls(_D, _S, mode, 3))
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
    for kind in RETURNS:
        try:
            return kind, max(_apart(module, kind, training, inputs, lengths) for training in (False, True))
        except Disagrees as error:
            refused = min(refused, error, key=lambda each: not str(each).startswith("the results differ"))
    raise refused


def _apart(module: nn.Module, kind: str, training: bool, inputs: Sequence[Tensor], lengths: list[int]) -> float:
    """The largest difference between the module and the library's scorer that returns the same kind."""
    image, caption = inputs[:2]
    module.train(training)
    buffers = [buffer.clone() for buffer in module.buffers()]
    expected = published(lambda: _results(module, buffers, inputs, lambda: module(image, caption, lengths)))
    found = _results(module, buffers, inputs, lambda: _returned(twin(module), kind, image, caption, lengths))
    return agreed(difference(expected, found))


def _results(
    module: nn.Module, buffers: Sequence[Tensor], inputs: Sequence[Tensor], call: Callable[[], Any]
) -> list[Any]:
    """Scores, gradients and the buffers afterwards, from these buffers and one random state."""
    for buffer, start in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(start)
    torch.manual_seed(1)
    return [*with_gradients(call, inputs), *(buffer.clone() for buffer in module.buffers())]
