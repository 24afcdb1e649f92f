"""Run a published function and its replacement on the same small random problem, and compare results and gradients."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

CLOSE = 1e-6  # the largest difference of a replacement from the code that it replaces, in float64


class Disagrees(Exception):
    """The replacement gives other results than the code that it would replace."""


class Fails(Exception):
    """The published code itself fails on the problem, so that nothing can be compared."""


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """New tensors are float64, nothing warns, and the caller's random state is kept."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def published(call: Callable[[], Any]) -> Any:
    """Run published code in silence, on the CPU and in the default precision, whatever device it asks for.

    It moves tensors to the GPU by `.cuda()` and `.to("cuda:1")`, in places only `if torch.cuda.is_available()`, and
    then relies on it; and IMRAM's casts to `.float()`, while its parameters are float64 where it is proved.

    Raises:
        Fails: it raises.
    """

    move, move_module = torch.Tensor.to, torch.nn.Module.to

    def stay(self, *args, **kwargs):
        return self

    def to(self, *args, **kwargs):
        where = kwargs.get("device", args[0] if args else None)
        if not isinstance(where, (str, int, torch.device)) or torch.device(where).type != "cuda":
            return (move if isinstance(self, Tensor) else move_module)(self, *args, **kwargs)
        kwargs.pop("device", None)
        rest = args[1:] if args else args
        return move(self, *rest, **kwargs) if isinstance(self, Tensor) and (rest or kwargs) else self

    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(torch.Tensor, "cuda", stay),
            mock.patch.object(torch.nn.Module, "cuda", stay),
            mock.patch.object(torch.Tensor, "to", to),
            mock.patch.object(torch.nn.Module, "to", to),
            mock.patch.object(torch.Tensor, "float", lambda x: move(x, torch.get_default_dtype())),
            mock.patch.object(torch.cuda, "is_available", return_value=True),
        ):
            return call()
    except Exception as error:
        said = str(error).strip().splitlines()
        raise Fails(f"{type(error).__name__}: {said[0] if said else ''}".rstrip(": ")) from error


def replacing(call: Callable[[], Any]) -> Any:
    """Run the library's code on what the published code took.

    Raises:
        Disagrees: it raises.
    """
    try:
        return call()
    except Disagrees:
        raise
    except Exception as error:
        said = str(error).strip().splitlines()
        raise Disagrees(f"the replacement cannot take it: {said[0] if said else type(error).__name__}") from error


def constructed(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """An object of a published class.

    Raises:
        Disagrees: it is constructed otherwise.
        Fails: it raises.
    """
    takes = inspect.signature(cls)
    try:
        takes.bind(*args, **kwargs)
    except TypeError as error:
        raise Disagrees(f"its constructor takes ({', '.join(takes.parameters)}): {error}") from error
    return published(lambda: cls(*args, **kwargs))


def difference(expected: Any, found: Any) -> float:
    """The largest difference between two results: tensors, arrays, numbers, or tuples and lists of them.

    Raises:
        Disagrees: they have another form.
    """
    if isinstance(expected, (tuple, list)) or isinstance(found, (tuple, list)):
        if not isinstance(found, type(expected)) or len(expected) != len(found):
            raise Disagrees(f"it returns {_form(expected)}, the replacement {_form(found)}")
        return max((difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    a, b = (np.asarray(x.detach() if isinstance(x, Tensor) else x, dtype=np.float64) for x in (expected, found))
    if a.shape != b.shape:
        raise Disagrees(f"it returns {_form(expected)}, the replacement {_form(found)}")
    if not a.size:
        return 0.0
    apart = float(np.abs(a - b).max())
    return float("inf") if np.isnan(apart) else apart


def _form(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return f"shape {list(np.shape(value.detach() if isinstance(value, Tensor) else value))}"


def with_gradients(call: Callable[[], Any], inputs: Sequence[Tensor]) -> list[Any]:
    """The result of `call`, and the gradients by `inputs` of its first tensor, or of all tensors of a list, weighted by
    fixed random numbers."""
    result = call()
    first = result[0] if isinstance(result, tuple) else torch.stack(result) if isinstance(result, list) else result
    weight = torch.randn(first.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((first * weight).sum(), inputs, allow_unused=True)
    return [result, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))]


def agreed(apart: float) -> float:
    """`apart`, if it is within `CLOSE`.

    Raises:
        Disagrees: it is not.
    """
    if not apart <= CLOSE:
        raise Disagrees(f"the results differ by {apart:.1e}")
    return apart
