"""A published pair scorer by the library's kernels, on the parameters of a repository's own object."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from ._families import Family, Given, Unlike
from ._proof import Disagrees, Fails, agreed, difference, published, replacing, with_gradients

_D, _S, _R = 16, 8, 36
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TWINS: weakref.WeakKeyDictionary[Any, dict[str, tuple[object, Any]]] = weakref.WeakKeyDictionary()


def _parameters(part: nn.Module) -> dict[str, Any]:
    """A module's own parameters. In the replicas of DataParallel they are tensors, which it keeps elsewhere."""
    replica = getattr(part, "_is_replica", False)
    return {**part._parameters, **(getattr(part, "_former_parameters", {}) if replica else {})}


def _named(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """All modules of these parts by their names in the library's scorer."""
    return {
        ".".join(filter(None, (prefix, name))): part
        for prefix, module in parts.items()
        for name, part in module.named_modules()
    }


def _shapes(modules: dict[str, nn.Module]) -> dict[str, torch.Size]:
    own = {name: _parameters(part) for name, part in modules.items()}
    return {f"{name}.{key}": x.shape for name, found in own.items() for key, x in found.items() if x is not None}


_WITH_CONSTANTS = (nn.Dropout, nn.BatchNorm1d, nn.LayerNorm)


def _constants(part: nn.Module) -> list[Any]:
    """What else such a module computes with."""
    return [getattr(part, name, None) for name in ("p", "eps", "momentum")]


def _hooked(part: nn.Module) -> bool:
    """Whether a module runs hooks; that of weight norm is part of the published code."""
    return any(not isinstance(hook, WeightNorm) for hooks in _HOOKS for hook in getattr(part, hooks).values())


def twin(known: Family, module: Any, given: Given) -> Any:
    """The library's scorer with this object's own parameters, buffers and modes.

    Raises:
        Unlike: there is none, as the object is built otherwise.
    """
    try:
        options = known.options(module, given)
        of_module = _TWINS.setdefault(module, {})
        before, ours = of_module.get(known.method, (None, None))
        if ours is None or before != options:
            with torch.device("meta"):  # takes no memory and draws no random numbers
                ours = known.ours(module, options)
            of_module[known.method] = options, ours
        own = _named(known.parts(module))
    except (AttributeError, ValueError) as error:
        raise Unlike(str(error)) from error
    if any(_hooked(part) for name, part in own.items() if name):
        raise Unlike("it has hooks inside")
    theirs = dict(ours.named_modules())
    if _shapes(own) != _shapes(theirs):
        raise Unlike("it has other parameters, or of other shapes")
    for name, part in theirs.items():
        if not name and name not in own:  # the published parts belong to no module that has them alone
            continue
        try:
            source = own[name]
            if isinstance(part, _WITH_CONSTANTS) and _constants(part) != _constants(source):
                raise Unlike(f"{name} has another rate or constant")
            part.training = source.training
            # Linked at every call: moving a module to another device gives it new buffers.
            found = _parameters(source)
            part._parameters.update({key: found[key] for key in part._parameters})
            part._buffers.update({key: source._buffers[key] for key in part._buffers})
        except KeyError as error:
            raise Unlike(f"it has no {name}.{error.args[0]}") from error
    return ours


def method(cls: Any, known: Family, returned: dict[str, str]) -> Callable[..., Any]:
    """A replacement of the published method.

    Args:
        cls: the class that was proved; subclasses, and objects that are built otherwise, keep its own code.
        known: its family.
        returned: the modes that were proved -> a key of `RETURNS`.
    """
    original: Callable[..., Any] = getattr(cls, known.method)
    takes = inspect.signature(original)

    def new(self, *args, **kwargs):
        given = takes.bind(self, *args, **kwargs).arguments
        given.pop("self")
        try:
            kind = returned.get(known.mode(self, given)) if type(self) is cls else None
            if kind is not None:
                return known.score(self, twin(known, self, given), given, kind)
        except Unlike:
            pass
        return original(self, *args, **kwargs)

    new.__signature__, new.__doc__ = takes, original.__doc__  # type: ignore[attr-defined]
    return new


def prove(cls: Any, known: Family, mode: str) -> tuple[str, float]:
    """Compare the published class with the library's scorer, in evaluation and in training.

    Compared are scores, gradients of images, captions and all parameters, and the buffers after a step of training.

    Returns:
        What the class returns, a key of `RETURNS`; and the largest difference.

    Raises:
        Disagrees: the results differ.
        Fails: the published class fails.
    """
    torch.manual_seed(0)
    module = known.make(cls, mode, _D, _S)
    parts = list(published(lambda: known.parts(module)).values())
    if not all(isinstance(part, nn.Module) for part in parts):
        raise Fails("it is no torch.nn.Module")
    parameters = [x for part in parts for x in part.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.uniform_(-0.4, 0.4)
    lengths = [6, 5, 4, 2]  # descending, as the published loader sorts them
    image = nn.functional.normalize(torch.randn(4, _R, _D), dim=2).requires_grad_()
    caption = nn.functional.normalize(torch.randn(4, 7, _D), dim=2).requires_grad_()
    batch, inputs = known.example(mode, image, caption, lengths), [image, caption, *parameters]
    refused = Disagrees("")
    for kind in known.returns:
        try:
            return kind, max(_apart(known, module, parts, kind, training, inputs, batch) for training in (False, True))
        except Disagrees as error:
            refused = min(refused, error, key=lambda each: not str(each).startswith("the results differ"))
    raise refused


def _apart(
    known: Family,
    module: Any,
    parts: Sequence[nn.Module],
    kind: str,
    training: bool,
    inputs: Sequence[Tensor],
    batch: tuple[Any, ...],
) -> float:
    """The largest difference between the object and the library's scorer that returns the same kind."""
    for part in (module,) if isinstance(module, nn.Module) else parts:
        part.train(training)
    buffers = [buffer for part in parts for buffer in part.buffers()]
    start = [buffer.clone() for buffer in buffers]
    theirs = getattr(module, known.method)
    expected = published(lambda: _results(buffers, start, inputs, lambda: theirs(*batch)))
    given = dict(zip(known.takes, batch, strict=True))
    run = lambda: known.score(module, twin(known, module, given), given, kind)  # noqa: E731
    return agreed(difference(expected, replacing(lambda: _results(buffers, start, inputs, run))))


def _results(
    buffers: Sequence[Tensor], starts: Sequence[Tensor], inputs: Sequence[Tensor], call: Callable[[], Any]
) -> list[Any]:
    """Scores, gradients and the buffers afterwards, from these buffers and one random state."""
    for buffer, start in zip(buffers, starts, strict=True):
        buffer.copy_(start)
    torch.manual_seed(1)
    return [*with_gradients(call, inputs), *(buffer.clone() for buffer in buffers)]
