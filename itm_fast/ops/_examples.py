"""A small example for every op, and the comparison of a backend with the reference on it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cuda
from .._checks import matmul_precision
from ._declare import DECLARED, Choice, Choosing, Floats
from ._draws import Example, Size

SMALL = Size(3, (5, 2), 7, 16, 8, 3)
PUBLISHED = Size(3, (13, 2), 36, 1024, 256, 3)  # the models' sizes, so these compiled kernels are used again afterwards
TF32 = 2.0**-10
UNITS = {torch.float32: 2.0**-16, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # float32 by three TF32 products


def example(op: str, size: Size = SMALL, kind: int | Example = 0) -> list[Any]:
    """Arguments of an op in the order of its public function, in float64; `kind` is one of `kinds(op)`, or makes them.

    >>> from itm_fast.ops._examples import example
    >>> [list(x.shape) for x in example("cross_attention_score")]
    [[3, 7, 16], [7, 16], [3]]
    """
    generator = torch.Generator().manual_seed(0)
    make = DECLARED[op].examples[kind] if isinstance(kind, int) else kind
    return make(size, lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64))


def choosing_of(op: str) -> Choosing:
    """The `choosing` of an op that has one."""
    found = DECLARED[op].choosing
    assert found is not None, op
    return found


def kinds(op: str) -> range:
    """Numbers of an op's examples: more than one if no single example reaches all of its kernels."""
    return range(len(DECLARED[op].examples))


def outcome(
    op: str,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    rounded: torch.dtype | None = None,
    size: Size = SMALL,
    backward: bool = True,
    kind: int | Example = 0,
    **options: Any,
) -> list[Tensor]:
    """An op's results on an example, and the gradients of the first result.

    Args:
        op: name of the op.
        backend: the backend to run.
        device: the device to run on.
        dtype: the dtype to run in.
        rounded: dtype that the example is rounded to first; None means `dtype`.
        size: of the example.
        backward: whether to compute gradients too.
        kind: the example, as `example` takes it.
        options: further arguments of the public function.

    Returns:
        Tensors on the CPU.
    """
    arguments = example(op, size, kind)
    names = list(inspect.signature(DECLARED[op].function).parameters)
    fixed = {a.name for a in DECLARED[op].arguments if isinstance(a, Floats) and a.fixed}
    leaves = []
    for k, (name, argument) in enumerate(zip(names, arguments)):
        if not isinstance(argument, Tensor):
            continue
        arguments[k] = argument.to(device)
        if argument.is_floating_point():
            arguments[k] = argument.to(rounded or dtype).to(device, dtype)
            if backward and name not in fixed:
                leaves.append(arguments[k].requires_grad_())
    with torch.set_grad_enabled(backward):
        results = DECLARED[op].function(*arguments, backend=backend, **options)
        results = results if isinstance(results, tuple) else (results,)
        results = tuple(x for x in results if x.is_floating_point())  # without the bounds that some ops return
        # Unequal weights: the plain sum of squares of unit vectors has no gradient.
        weights = torch.arange(results[0].numel(), device=device).cos().to(dtype).view_as(results[0])
        found = torch.autograd.grad((weights * results[0]).sum(), leaves) if backward else ()
    return [x.detach().cpu() for x in (*results, *found)]


def problem(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    chosen: tuple[tuple[str, str], ...] = (),
    **options: Any,
) -> str | None:
    """Tell what is wrong with an op's backend on a device, if anything.

    Meant to find broken kernels, so the tolerance is wide: each result and gradient may have eight times the error of
    the reference in the same dtype, plus 16 units of rounding of its largest value.

    Args:
        op: name of the op.
        backend: the backend to check.
        device: the device to run on.
        dtype: the dtype to run in; float32 with the products that `torch.get_float32_matmul_precision` allows.
        backward: whether to check gradients too.
        chosen: names and values of options that choose kernels, which have an example of their own.
        options: further ones of the op, where they are not the default ones.

    Returns:
        None, or one line: the exception that was raised, or what is wrong by how much.

    >>> import torch
    >>> from itm_fast.ops._examples import problem
    >>> problem("similarity_graph", "torch", torch.device("cpu"), torch.float32, backward=True) is None
    True
    """
    given = op, backend, device, dtype
    found = (_problem(*given, backward, case.kind, **case.options | options) for case in _cases(op, chosen))
    return next((line for line in found if line), None)


class _Case(NamedTuple):
    """A call on which kernels are checked: its example, as `example` takes it, and options."""

    kind: int | Example
    options: dict[str, Any]


def _cases(op: str, chosen: tuple[tuple[str, str], ...]) -> list[_Case]:
    """The calls on which kernels are checked that an op's options choose: those of `Choosing.apart` on an example of
    their own, the others on the examples of all calls or on those that take their place, and a direction together with
    either."""
    if not chosen:
        return [_Case(kind, {}) for kind in kinds(op)]
    choosing = choosing_of(op)
    apart = {name: value for name, value in chosen if name in choosing.apart}
    plain = {name: value for name, value in chosen if name not in choosing.apart}
    way = {name: value for name, value in plain.items() if name == "direction"}
    cases = [_Case(choosing.example, {**choosing.given, **apart, **way})] if apart else []
    if not apart or plain != way:
        instead = [_Case(*choosing.instead[o]) for o in plain.items() if o in choosing.instead]
        cases += [_Case(kind, options | plain) for kind, options in instead or (_Case(kind, {}) for kind in kinds(op))]
    return cases


def ways(op: str) -> list[dict[str, Any]]:
    """Options of calls that run all kernels of an op: each direction has its own."""
    choices = (a.choices for a in DECLARED[op].arguments if isinstance(a, Choice) and a.name == "direction")
    return [{"direction": way} for way in next(choices, ())] or [{}]


def variants_differ(
    op: str, device: torch.device, dtype: torch.dtype, chosen: tuple[tuple[str, str], ...] = ()
) -> str | None:
    """Tell how results of CUDA kernels for one GPU alone differ from those of the kernels for all, if they do.

    Both round the same numbers in the same way, and add in another order.

    Args:
        op: name of the op.
        device: where to run.
        dtype: the dtype to run in.
        chosen: as for `problem`: only the kernels that these options choose run.

    Returns:
        None, or one line.
    """
    found = (_variants_differ(op, device, dtype, case.kind, case.options) for case in _cases(op, chosen))
    return next((line for line in found if line), None)


def _variants_differ(
    op: str, device: torch.device, dtype: torch.dtype, kind: int | Example, options: dict[str, Any]
) -> str | None:
    size = PUBLISHED if device.type == "cuda" else SMALL
    results, best = [], _cuda.asked_variant(op, device, dtype)
    try:
        for allowed in (best, _cuda.GENERAL):
            _cuda.allow_variant(op, device, dtype, allowed)
            found = outcome(op, "cuda", device, dtype, size=size, backward=False, kind=kind, **options)
            results.append(found[0].double())
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # as in `_problem`
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        _cuda.allow_variant(op, device, dtype, best)
    mine, plain = results
    off, most = (mine - plain).abs().max().item(), 2 * _unit(dtype) * plain.abs().max().item()
    return None if off <= most else f"kernels for this GPU alone are off by {off:.1e} of the others, allowed {most:.1e}"


def _unit(dtype: torch.dtype) -> float:
    """The unit of rounding of products in a dtype, of float32 at the precision that is set."""
    return TF32 if dtype == torch.float32 and matmul_precision() != "highest" else UNITS[dtype]


def _problem(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, backward: bool, kind: int | Example, **options: Any
) -> str | None:
    size = PUBLISHED if device.type == "cuda" else SMALL
    try:
        found = outcome(op, backend, device, dtype, size=size, backward=backward, kind=kind, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a compiler, a driver or a launch raises is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    same, exact = (
        outcome(op, "reference", "cpu", work, rounded=dtype, size=size, backward=backward, kind=kind, **options)
        for work in (dtype, torch.float64)
    )
    size_of = [x.abs().max().item() if x.numel() else 0.0 for x in exact]
    for k, (mine, plain, true) in enumerate(zip(found, same, exact, strict=True)):
        if not true.numel():
            continue
        off = (mine.double() - true).abs().max().item()
        # A gradient that is exactly zero, as a key bias's, comes out as rounding error of the size of the other ones.
        scale = max(size_of[k], 1e-4 * max(size_of[1:])) if k else size_of[0]
        allowed = 8 * (plain.double() - true).abs().max().item() + 16 * _unit(dtype) * scale
        if not off <= allowed:
            return f"a {'gradient' if k else 'result'} is off by {off:.2g} where {allowed:.2g} is allowed"
    return None
