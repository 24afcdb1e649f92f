"""The declaration of an op: one row for each argument and each result.

A row gives a name, a kind, and the shape in letters, the choices or the bounds. From the rows follow the op's schema in
torch's language, the checks of its public function, the shapes of its results, what autocast narrows, which arguments
have a gradient, how pairs are cut out of them (`_recompute.of_pairs`), and the struct that C++ is called with
(`_calls`).

Shapes are written in letters as `_checks.Shape` says; those of results may add and multiply: "N+T*C".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .._checks import Arguments, Shape, autocast, work_dtype
from ._draws import Example

DECLARED: dict[str, Declaration] = {}  # the ops by name, filled as each is registered
F = TypeVar("F", bound=Callable[..., Any])
Given = Mapping[str, Any]  # the arguments of a call by name


@dataclass
class Argument:
    """One argument of an op. The kinds below say what its values are."""

    name: str
    type: ClassVar[str]  # in torch's schema language

    def check(self, check: Arguments, given: Given) -> None:
        """Raise a ValueError or TypeError where the argument's value is not allowed."""

    def convert(self, value: Any) -> Any:
        """The value as the registered op takes it."""
        return value


@dataclass
class TensorArgument(Argument):
    """A tensor, and its shape in letters; if `optional`, it may be None."""

    letters: str
    optional: bool = False

    def __post_init__(self) -> None:
        self.shape = Shape(self.letters)

    @property
    def type(self) -> str:  # type: ignore[override]
        return "Tensor?" if self.optional else "Tensor"


@dataclass
class Floats(TensorArgument):
    """A tensor of floats, of one dtype and device with the others.

    It may need a gradient and autocast narrows it, unless it is `fixed`.
    """

    fixed: bool = False

    def check(self, check: Arguments, given: Given) -> None:
        check.floats(self.name, given[self.name], self.shape)


@dataclass
class Integers(TensorArgument):
    """A tensor of int32 or int64."""

    def check(self, check: Arguments, given: Given) -> None:
        if not self.optional or given[self.name] is not None:
            check.integers(self.name, given[self.name], self.shape)


@dataclass
class Choice(Argument):
    """One of some words; `enum` is the enumeration that has them in C++."""

    type = "str"
    choices: tuple[str, ...]
    enum: str

    def check(self, check: Arguments, given: Given) -> None:
        check.choice(self.name, given[self.name], self.choices)


@dataclass
class Number(Argument):
    """Any number."""

    type = "float"

    def convert(self, value: Any) -> Any:
        return float(value)


@dataclass
class Positive(Number):
    """A finite number more than 0; with `when`, only where another argument has a value: (its name, the value)."""

    when: tuple[str, Any] | None = None

    def check(self, check: Arguments, given: Given) -> None:
        if self.when is None or given[self.when[0]] == self.when[1]:
            check.positive(self.name, given[self.name])


@dataclass
class Share(Number):
    """A number from 0 to 1."""

    def check(self, check: Arguments, given: Given) -> None:
        check.share(self.name, given[self.name])


@dataclass
class Flag(Argument):
    """True or False."""

    type = "bool"


@dataclass
class Counts(Argument):
    """A sequence of integers."""

    type = "int[]"

    def convert(self, value: Any) -> Any:
        return [int(n) for n in value]


@dataclass
class Result:
    """One result of an op, in the dtype of the first argument, or, if `wide`, in float32 or better.

    Its shape is given in letters, or by a function of the sizes by letter and of the arguments by name, `backend` among
    them.
    """

    name: str
    shape: str | Callable[[dict[str, int], Given], tuple[int, ...]]
    wide: bool = False

    def sizes(self, size: dict[str, int], given: Given) -> Sequence[int]:
        """Its sizes, from those by letter and the arguments by name."""
        if callable(self.shape):
            return self.shape(size, given)
        return [size[d] if d in size else _sum(d, size) for d in self.shape.split()]


def _sum(text: str, size: dict[str, int]) -> int:
    return sum(math.prod(size[letter] for letter in product.split("*")) for product in text.split("+"))


class Declaration:
    """An op as its file declares it.

    Args:
        name: the op's stem.
        arguments: in the order of the registered op: those with a gradient first, then all other tensors.
        results: only the first one carries gradients.
        offered: the backends that exist, best first.
        reference: the equations in plain PyTorch, with the arguments in this order.
        examples: the op's arguments in the order of its public function, for the checks of a backend.
        refuse: the sizes by letter and the arguments by name -> what else is wrong with them, or None.
        too_large: the sizes by letter -> why Triton's kernels cannot take them, or None.
        backward: for an op whose kernels have only the forward pass, the backend whose backward pass they take, or a
            function of the backend and of what a backward pass takes.
        keeps: the results are kept for backward, which takes them as `results=`.
        widens: autocast makes the tensors float32 instead of its own dtype.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[Argument],
        results: Sequence[Result],
        *,
        offered: tuple[str, ...],
        reference: Callable[..., Any],
        examples: Sequence[Example],
        refuse: Callable[[dict[str, int], Given], str | None] | None = None,
        too_large: Callable[[dict[str, int]], str | None] | None = None,
        backward: str | Callable[..., list[Tensor]] | None = None,
        keeps: bool = False,
        widens: bool = False,
    ) -> None:
        self.name, self.arguments, self.results = name, tuple(arguments), tuple(results)
        self.offered, self.reference, self.examples = offered, reference, tuple(examples)
        self.refuse, self.too_large, self.backward = refuse, too_large, backward
        self.keeps, self.widens = keeps, widens
        self.names = [a.name for a in self.arguments]
        self.differentiable = sum(isinstance(a, Floats) and not a.fixed for a in self.arguments)
        self.schema = ", ".join(f"{a.type} {a.name}" for a in self.arguments)
        self.returns = "Tensor" if len(self.results) == 1 else f"({', '.join(['Tensor'] * len(self.results))})"
        self.depends = any(callable(r.shape) for r in self.results)  # some shape depends on more than sizes
        self.converted = [(k, a) for k, a in enumerate(self.arguments) if type(a).convert is not Argument.convert]
        # Where each size is read: the place of a tensor, its dimension, and how much more than the size that is.
        self.places: dict[str, tuple[int, int, int]] = {}
        for k, argument in enumerate(self.arguments):
            if isinstance(argument, TensorArgument) and not argument.optional:
                for dim, (letter, more) in enumerate(argument.shape.dims):
                    if not letter.isdigit():
                        self.places.setdefault(letter, (k, dim, more))
        # For an op whose result is the score of every pair, what `_recompute.of_pairs` asks about its arguments.
        axes = {"I": "I", "T": "T", "N": "N", "T+1": "E"}
        first = [a.shape.labels[0] if isinstance(a, TensorArgument) else "" for a in self.arguments]
        scores = [r.shape for r in self.results] == ["I T"]
        self.pairs = "".join(axes.get(label, ".") for label in first) if scores else None

    def public(self, function: F) -> F:
        """Note the op's public function, which this decorates, for the checks that call it."""
        self.function = function
        return function

    def check(self, given: Given) -> dict[str, int]:
        """Check the arguments of a call and return the sizes by letter.

        Raises:
            ValueError: a shape, a device or an option is wrong.
            TypeError: a dtype is wrong.
        """
        check = Arguments(self.name)
        for argument in self.arguments:
            argument.check(check, given)
        if self.refuse is not None and (problem := self.refuse(check.size, given)):
            raise ValueError(f"{self.name}: {problem}")
        return check.size

    def convert(self, given: Given) -> list[Any]:
        """The arguments of a call in the registered op's order, tensors in the dtype that autocast wants."""
        values = [given[name] for name in self.names]
        for k, argument in self.converted:
            values[k] = argument.convert(values[k])
        n = self.differentiable
        if torch.is_autocast_enabled(values[0].device.type):
            values[:n] = [x.to(work_dtype(x)) for x in values[:n]] if self.widens else autocast(*values[:n])
        return values

    def size(self, args: Sequence[Any]) -> dict[str, int]:
        """The sizes by letter of arguments in the registered op's order, which have been checked."""
        return {letter: args[k].shape[dim] - more for letter, (k, dim, more) in self.places.items()}

    def empty(
        self, args: Sequence[Any], backend: str, size: dict[str, int] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Results without values, of the right shapes and dtypes, for arguments in the registered op's order."""
        size, first = size or self.size(args), args[0]
        given = dict(zip(self.names, args), backend=backend) if self.depends else {}
        shapes = [r.sizes(size, given) for r in self.results]
        if len(shapes) == 1:
            return first.new_empty(shapes[0])
        wide = work_dtype(first)
        return tuple(
            first.new_empty(shape, dtype=wide if r.wide else first.dtype) for r, shape in zip(self.results, shapes)
        )


def empty(op: str, *args: Any, backend: str = "torch") -> Any:
    """Results of an op without values, for an implementation to fill; see `Declaration.empty`."""
    return DECLARED[op].empty(args, backend)
