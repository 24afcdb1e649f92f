"""Registration of an op with torch.library: schema, fake implementation, autograd, and the call of the chosen backend.

An implementation has `forward(*args) -> Tensor | tuple` and `backward(grad, needs, *args) -> list[Tensor]`: one
gradient for each differentiable argument that `needs` marks, in the dtype it was summed in. `args` are those of the
declaration. It is the module of the op's stem in its backend's package or, for C++, made by `_cpu_calls`; either is
imported only when it runs. In a module of several ops the functions have the names of C++: `<op>` and `<op>_backward`;
and, for `_kept.Recording`, `<op>_recorded`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._backends import KERNELS, OFFERS, ON_GPU, PutAside, TooLarge, backward_of_cuda, resolve
from .._checks import plain, without_autocast
from .._workspace import current_gib, workspace
from . import _recompute
from ._autograd import by_autograd
from ._declare import DECLARED, Declaration, Given
from ._first_use import put_aside

PACKAGES = {"triton": "itm_fast.kernels", "cuda": "itm_fast.ops._cuda", "torch": "itm_fast.ops._torch"}


def _told(reasons: dict[str, str | None], backend: str) -> str | None:
    return reasons[backend]


def _seen_by_name() -> bool:
    """Whether a profiler or a torch function mode is on, which is told the names of ops."""
    return torch.autograd._profiler_enabled() or torch._C._is_torch_function_mode_enabled()


class Op(Declaration):
    """A declared op, registered as one of `torch.ops.itm_fast`; a call checks its arguments and chooses the backend.

    Args:
        args, options: of `Declaration`.
        keeping: by backend, the differentiable function of the registered op's arguments that runs the op there where a
            gradient may be asked for, and keeps more for that than inputs and results; torch.compile does without.
    """

    def __init__(self, *args: Any, keeping: Mapping[str, Callable[..., Any]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.keeping = keeping or {}
        name, schema, keeps = self.name, self.schema, self.keeps
        differentiable = self.differentiable
        DECLARED[name], OFFERS[name] = self, self.offered
        forward, backward = f"itm_fast::{name}", f"itm_fast::{name}_backward"
        torch.library.define(forward, f"({schema}, str backend) -> {self.returns}")
        kept = ", Tensor[] results" if keeps else ""
        torch.library.define(backward, f"(Tensor grad, bool[] needs, {schema}{kept}, str backend) -> Tensor[]")

        torch.library.impl(forward, "CompositeExplicitAutograd", self.run)
        torch.library.impl(backward, "CompositeExplicitAutograd", self.run_backward)

        @torch.library.register_fake(forward)
        def _fake(*args):
            return self.empty(args[:-1], args[-1])

        @torch.library.register_fake(backward)
        def _fake_backward(grad, needs, *args):
            return [a.new_empty(a.shape) for a, n in zip(args[:differentiable], needs, strict=True) if n]

        op_backward = getattr(torch.ops.itm_fast, f"{name}_backward").default

        def setup_context(ctx, inputs, output):
            if not isinstance(output, Tensor):
                ctx.mark_non_differentiable(*output[1:])
            ctx.scratch = current_gib()  # autograd may run backward on a thread that does not see `workspace(...)`
            ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)), *(output if keeps else ()))
            ctx.rest = [a for a in inputs if not isinstance(a, Tensor)]

        def differentiate(ctx, grad, *_):
            _recompute.refuse_second(name)
            tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
            args = [next(tensors) if t else next(rest) for t in ctx.is_tensor]
            needs = list(ctx.needs_input_grad[:differentiable])
            if keeps:
                args.insert(-1, list(tensors))
            with workspace(ctx.scratch):
                found = iter(op_backward(grad, needs, *args))
            return tuple(next(found) if n else None for n in needs) + (None,) * (len(ctx.is_tensor) - differentiable)

        torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
        self.call = getattr(torch.ops.itm_fast, name).default
        self.has_kernels = not KERNELS.isdisjoint(self.offered)

    def __call__(self, *, backend: str | None, **given: Any) -> Any:
        """Run the op on arguments that are given by name.

        Raises:
            ValueError: a shape, a device or an option is wrong.
            TypeError: a dtype is wrong.
            NotImplementedError: the backend asked for cannot run here; the message says why.
        """
        first, size = given[self.arguments[0].name], self.check(given)
        dtype = first.dtype if self.has_kernels else None  # PyTorch takes all dtypes
        too_large, traced = self.refused_sizes(size, given), torch.compiler.is_compiling()
        name = resolve(self.name, backend, first.device, dtype, too_large, self.put_aside(given), traced)
        args, keeping = self.convert(given), self.keeping.get(name)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not first.is_cpu or not plain(*tensors) or _seen_by_name():
            return self.call(*args, name)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return self.run(*args, name)  # as torch's dispatcher would, which takes longer than small scores
        if keeping is not None and any(x.requires_grad for x in args[: self.differentiable]):
            return keeping(*args)
        return self.call(*args, name)

    def run(self, *args: Any) -> Any:
        """The registered op: its forward pass in the backend that the last of its arguments names."""
        # The inputs are already in autocast's dtype; inside, the op decides on its precision.
        with without_autocast(args[0].device.type):
            return self.implementation(self.chosen(args)).forward(*args[:-1])

    def run_backward(self, grad: Tensor, needs: list[bool], *args: Any) -> list[Tensor]:
        """The registered op's backward pass, whose arguments are followed by results where it `keeps` them."""
        with without_autocast(args[0].device.type):
            backend = self.chosen(args)
            chosen = self.implementation(self.after_cuda(args) if backend == "cuda" else backend)
            dense = chosen.backward
            if self.keeps:
                found = dense(grad, needs, *args[:-2], results=args[-2])
            elif self.pairs is None or getattr(chosen, "leaves_out", False):
                found = dense(grad, needs, *args[:-1])
            else:
                found = _recompute.of_pairs(dense, self.pairs, grad, needs, args[:-1])
        wanted = [a for a, n in zip(args, needs, strict=False) if n]
        return [g.to(a.dtype).contiguous() for g, a in zip(found, wanted, strict=True)]

    def chosen(self, args: Sequence[Any]) -> str:
        """The backend of a call of the registered op, whose last argument is it, or "auto" if a trace left it open."""
        if args[-1] != "auto":
            return args[-1]
        given, first = dict(zip(self.names, args)), args[0]
        too_large = self.refused_sizes(self.size(args), given)
        return resolve(self.name, "auto", first.device, first.dtype, too_large, self.put_aside(given))

    def refused_sizes(self, size: dict[str, int], given: Given) -> TooLarge | None:
        """A function that says why the kernels of a backend for GPUs cannot take these sizes; None if all take all.

        It may have to wait for lengths on a GPU, and so is called only for backends that can run.
        """
        too_large = self.too_large
        if too_large is None:
            return None
        if torch.compiler.is_compiling():  # which hands only constants to `resolve`
            return partial(_told, {name: too_large(name, size, given) for name in ON_GPU})
        return lambda backend: too_large(backend, size, given)

    def put_aside(self, given: Given) -> PutAside:
        """The check of first use for a call's arguments."""
        chosen = self.chosen_by(given)
        return partial(put_aside, chosen=chosen) if chosen else put_aside

    def implementation(self, backend: str) -> Any:
        """The op's `forward` and `backward` in a backend."""
        if backend == "reference":
            return by_autograd(self.reference)
        if backend == "cpu":
            from ._cpu_calls import implementation

            found = implementation(self.name)
        else:
            found = import_module(f"{PACKAGES[backend]}.{self.stem}")
            if self.stem != self.name:
                parts = {"forward": "", "backward": "_backward", "forward_recorded": "_recorded"}
                found = SimpleNamespace(**{p: getattr(found, self.name + more, None) for p, more in parts.items()})
        if backend not in KERNELS or self.backward is None:
            return found
        if isinstance(self.backward, str):
            if backend == "triton" and hasattr(found, "backward"):
                return found
            return SimpleNamespace(forward=found.forward, backward=self.implementation(self.backward).backward)
        return SimpleNamespace(forward=found.forward, backward=partial(self.backward, backend), leaves_out=True)

    def after_cuda(self, args: Sequence[Any]) -> str:
        """The backend of the backward pass of a forward pass in "cuda"."""
        given = dict(zip(self.names, args))
        too_large, aside = self.refused_sizes(self.size(args), given), self.put_aside(given)
        return backward_of_cuda(self.name, args[0].device, args[0].dtype, too_large, aside)
