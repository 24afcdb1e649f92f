"""The heads of the pair scorers in `similarity_score`: ops that turn a pair's nodes into one vector, and the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from . import _attention, _draws
from ._declare import Argument, Choice, Floats, Given, Positive
from .similarity_filter import reference as filtered
from .similarity_graph import PARAMETERS, refuse
from .similarity_graph import reference as reasoned
from .similarity_nodes import INPUTS, REST

SCORE = Floats("score_weight", "S"), Floats("score_bias", "1")
OUTPUT = (Choice("output", _attention.OUTPUTS, "Output"),)


@dataclass(frozen=True)
class Head:
    """An op that turns a pair's nodes into one vector z [S], and the arguments that a scorer passes to it.

    Attributes:
        op: its name.
        reference: its reference.
        vectors: (run, nodes, bounds, parameters, statistics, options) -> z [I, T, S], where `run` is the op or its
            reference.
        draw: makes an example's parameters and statistics.
        parameters: its differentiable arguments.
        statistics: its other tensors.
        options: its arguments that are not tensors.
        refuse: as in `Declaration`.
    """

    op: str
    reference: Callable[..., Any]
    vectors: Callable[..., Tensor]
    draw: _draws.Example
    parameters: tuple[Argument, ...]
    statistics: tuple[Argument, ...] = ()
    options: tuple[Argument, ...] = ()
    refuse: Callable[[dict[str, int], Given], str | None] | None = None

    @property
    def groups(self) -> tuple[tuple[Argument, ...], ...]:
        """The scorer's arguments by group, in the order of the registered op."""
        return INPUTS, self.parameters, SCORE, self.statistics, REST, self.options, OUTPUT

    def split(self, args: Sequence[Any]) -> list[list[Any]]:
        """The values of a call's arguments, a list for each group."""
        values = iter(args)
        return [list(islice(values, len(group))) for group in self.groups]


def _graph(run: Callable[..., Any], nodes: Tensor, bounds: Tensor, parameters, statistics, options) -> Tensor:
    return run(nodes, *parameters, bounds)


def _filter(run: Callable[..., Any], nodes: Tensor, bounds: Tensor, parameters, statistics, options) -> Tensor:
    return run(nodes, *parameters, *(x.to(nodes.dtype) for x in statistics), bounds, False, *options)[0]


GRAPH = Head("similarity_graph", reasoned, _graph, _draws.graph_weights, PARAMETERS, refuse=refuse)
FILTER = Head(
    "similarity_filter",
    filtered,
    _filter,
    _draws.filter_weights,
    (Floats("filter_weight", "S"), Floats("filter_bias", "1"), Floats("norm_weight", "1"), Floats("norm_bias", "1")),
    (Floats("running_mean", "1", fixed=True), Floats("running_var", "1", fixed=True)),
    (Positive("eps"),),
)


def scored(output: str, z: Tensor, score_weight: Tensor, score_bias: Tensor) -> Tensor:
    """(3): z [I, T, S] -> [I, T]."""
    logit = z @ score_weight + score_bias
    return logit if output == "logit" else logit.sigmoid()
