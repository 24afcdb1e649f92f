"""The declaration of an op: one row for each argument and each result.

A row gives a name, a kind (the classes below), and the shape in letters, the choices or the bounds. From the rows
follow the op's torch.library schema, the checks of its public function, the shapes of its results, which arguments
autocast converts, which have a gradient, how a block of pairs is cut out of them (`_recompute.of_pairs`), and the
struct that C++ is called with (`_calls`).

`_checks.Shape` explains shapes in letters; those of results may add and multiply sizes: "N+T*C".
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
CPU_ONLY: dict[str, Declaration] = {}  # what ops call in C++ without its being a registered op, likewise
F = TypeVar("F", bound=Callable[..., Any])
Given = Mapping[str, Any]  # the arguments of a call by name


@dataclass
class Argument:
    """One argument of an op. The kinds below say what its values are."""

    name: str
    type: ClassVar[str]  # in a torch.library schema

    def check(self, check: Arguments, given: Given) -> None:
        """Raise a ValueError or TypeError where the argument's value is not allowed."""

    def convert(self, value: Any) -> Any:
        """The value as the registered op takes it."""
        return value


@dataclass
class TensorArgument(Argument):
    """A tensor of the shape `letters`; if `optional`, it may be None."""

    letters: str
    optional: bool = False

    def __post_init__(self) -> None:
        self.shape = Shape(self.letters)

    @property
    def type(self) -> str:  # type: ignore[override]
        return "Tensor?" if self.optional else "Tensor"


@dataclass
class Floats(TensorArgument):
    """A floating-point tensor; all of an op's have one dtype and device.

    It may need a gradient, and autocast converts it, unless it is `fixed`.
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

    def check(self, check: Arguments, given: Given) -> None:
        check.number(self.name, given[self.name])

    def convert(self, value: Any) -> Any:
        return float(value)


@dataclass
class Positive(Number):
    """A finite number more than 0; with `when` = (argument, values), checked only if that argument has one of them."""

    when: tuple[str, tuple[Any, ...]] | None = None

    def check(self, check: Arguments, given: Given) -> None:
        super().check(check, given)
        if self.when is None or given[self.when[0]] in self.when[1]:
            check.positive(self.name, given[self.name])


@dataclass
class Share(Number):
    """A number from 0 to 1."""

    def check(self, check: Arguments, given: Given) -> None:
        super().check(check, given)
        check.share(self.name, given[self.name])


@dataclass
class Flag(Argument):
    """True or False."""

    type = "bool"

    def check(self, check: Arguments, given: Given) -> None:
        check.flag(self.name, given[self.name])

    def convert(self, value: Any) -> Any:
        return bool(value)


@dataclass
class Counts(Argument):
    """A sequence of integers."""

    type = "int[]"

    def check(self, check: Arguments, given: Given) -> None:
        check.counts(self.name, given[self.name])

    def convert(self, value: Any) -> Any:
        return [int(n) for n in value]


@dataclass
class Result:
    """One result of an op, in the dtype of the first argument, or, if `wide`, in float32 or better.

    `shape` is in letters, or a function (sizes by letter, arguments and `backend` by name) -> shape.
    """

    name: str
    shape: str | Callable[[dict[str, int], Given], tuple[int, ...]]
    wide: bool = False

    def sizes(self, size: dict[str, int], given: Given) -> Sequence[int]:
        """Its shape, given the sizes by letter and the arguments by name."""
        if callable(self.shape):
            return self.shape(size, given)
        return [size[d] if d in size else _sum(d, size) for d in self.shape.split()]


@dataclass
class Choosing:
    """Options of words whose values choose among an op's kernels, each of which is checked before its first use.

    Attributes:
        defaults: their default values, whose kernels the examples of the op check.
        example: makes the arguments on which kernels of other values of the options `apart` are checked, as rounding
            does not change there which contexts they keep. Those of the others are checked on the examples of the op,
            or on that of `instead`.
        apart: some of the names of `defaults`.
        given: further options with `example`; they stand in for those of a call.
        instead: (option, value) -> (an example, further options with it), which take the place of the op's own examples
            where rounding could change on those which queries the pool counts.
    """

    defaults: dict[str, str]
    example: Example
    apart: frozenset[str]
    given: dict[str, Any]
    instead: dict[tuple[str, str], tuple[Example, dict[str, Any]]]


def _sum(text: str, size: dict[str, int]) -> int:
    return sum(math.prod(size[letter] for letter in product.split("*")) for product in text.split("+"))


class Declaration:
    """An op as its file declares it.

    Args:
        name: the op's name, as one of `torch.ops.itm_fast`.
        arguments: in the order of the registered op: those with a gradient first, then all other tensors.
        results: only the first one carries gradients.
        offered: the backends that implement it, best first.
        reference: the equations in plain PyTorch, with the arguments in this order.
        examples: functions that make arguments in the order of the public function, for the checks of a backend.
        stem: the name of its files in each folder, where it shares them with other ops; None means `name`.
        choosing: the options whose values choose among the op's kernels, or None.
        refuse: (sizes by letter, arguments by name) -> what is wrong that the rows do not check, or None.
        too_large: ("triton" or "cuda", sizes by letter, arguments by name) -> why that backend's kernels cannot take
            them, or None.
        backward: for an op whose kernels in C++, and in Triton unless their file has `backward`, have a forward pass
            only: the backend whose backward they use, or a function that is called as an implementation's `backward`
            with the backend in front. A forward pass in "cuda" uses the backward pass of "triton" or "torch".
        keeps: the results are saved for backward, which gets them as `results=`.
        trained: what C++ can write in a forward pass that will be differentiated, so that backward need not compute it
            again.
        widens: autocast converts the tensors to float32 instead of its own dtype.
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
        stem: str | None = None,
        choosing: Choosing | None = None,
        refuse: Callable[[dict[str, int], Given], str | None] | None = None,
        too_large: Callable[[str, dict[str, int], Given], str | None] | None = None,
        backward: str | Callable[..., list[Tensor]] | None = None,
        keeps: bool = False,
        trained: Result | None = None,
        widens: bool = False,
    ) -> None:
        self.name, self.arguments, self.results = name, tuple(arguments), tuple(results)
        self.stem = stem or name
        self.offered, self.reference, self.examples = offered, reference, tuple(examples)
        self.choosing = choosing
        self.refuse, self.too_large, self.backward = refuse, too_large, backward
        self.keeps, self.widens, self.trained = keeps, widens, trained
        self.written = self.results + (() if trained is None else (trained,))  # all that C++ may write in forward
        self.names = [a.name for a in self.arguments]
        self.differentiable = sum(isinstance(a, Floats) and not a.fixed for a in self.arguments)
        self.schema = ", ".join(f"{a.type} {a.name}" for a in self.arguments)
        self.returns = "Tensor" if len(self.results) == 1 else f"({', '.join(['Tensor'] * len(self.results))})"
        self.depends = any(callable(r.shape) for r in self.results)  # some shape depends on more than sizes
        self.converted = [(k, a) for k, a in enumerate(self.arguments) if type(a).convert is not Argument.convert]
        # letter -> where its size is read: (position of a tensor, its dimension, how much longer that is: 1 for "T+1").
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
        """Decorator: register the op's public function, so that the checks of a backend can call it."""
        self.function = function
        return function

    def chosen_by(self, given: Given) -> tuple[tuple[str, str], ...]:
        """Names and values of the options of `choosing` that have not their default values."""
        plain = {} if self.choosing is None else self.choosing.defaults
        return tuple((name, given[name]) for name, value in plain.items() if given[name] != value)

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
        """The arguments of a call in the registered op's order, tensors converted as autocast asks."""
        values = [given[name] for name in self.names]
        for k, argument in self.converted:
            values[k] = argument.convert(values[k])
        n = self.differentiable
        if torch.is_autocast_enabled(values[0].device.type):
            values[:n] = [x.to(work_dtype(x)) for x in values[:n]] if self.widens else autocast(*values[:n])
        return values

    def size(self, args: Sequence[Any]) -> dict[str, int]:
        """The sizes by letter; `args` are in the registered op's order and have been checked."""
        return {letter: args[k].shape[dim] - more for letter, (k, dim, more) in self.places.items()}

    def empty(
        self, args: Sequence[Any], backend: str, size: dict[str, int] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Uninitialised results of the right shapes and dtypes; `args` are in the registered op's order."""
        size, first = size or self.size(args), args[0]
        given = dict(zip(self.names, args), backend=backend) if self.depends else {}
        shapes = [r.sizes(size, given) for r in self.results]
        if len(shapes) == 1:
            return first.new_empty(shapes[0])
        wide = work_dtype(first)
        return tuple(
            first.new_empty(shape, dtype=wide if r.wide else first.dtype) for r, shape in zip(self.results, shapes)
        )

    def empty_trained(self, args: Sequence[Any], backend: str) -> tuple[Tensor, Tensor]:
        """`empty` for an op with one result, and an uninitialised `trained`."""
        result, size = self.empty(args, backend), self.size(args)
        assert isinstance(result, Tensor)
        assert self.trained is not None
        shape = self.trained.sizes(size, dict(zip(self.names, args)))
        return result, args[0].new_empty(shape, dtype=work_dtype(args[0]))


def cpu_only(
    name: str, arguments: Sequence[Argument], results: Sequence[Result], *, backward: str | None = None
) -> Declaration:
    """Declare what ops call in C++ only: functions `<name>` and `<name>_backward` that are called like an op's, but
    are not registered with torch. `backward` is as in `Declaration`."""
    found = Declaration(name, arguments, results, offered=("cpu",), reference=_none, examples=[], backward=backward)
    CPU_ONLY[name] = found
    return found


def _none(*args: Any) -> Any:
    raise NotImplementedError("this is a part of an op, and has no reference")


def empty(op: str, *args: Any, backend: str = "torch") -> Any:
    """Uninitialised results of an op, for an implementation to fill; see `Declaration.empty`."""
    return DECLARED[op].empty(args, backend)
