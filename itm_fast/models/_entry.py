"""A row of the catalogue of models, and the recipes.

This module does not import torch, as `_catalogue` does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._options import COMMON, Option

if TYPE_CHECKING:
    from ._common import Matcher

# Values that a recipe sets for every model; `Entry.differs` has those that a model's own paper changes.
RECIPES: dict[str, dict[str, Any]] = {
    "f30k": {"num_epochs": 30, "lr_update": 20},
    "coco": {"num_epochs": 20, "lr_update": 10},
}


@dataclass(frozen=True)
class Entry:
    """A model, described without importing its class.

    Attributes:
        name: its name for `itm-fast train --model`.
        title: its name in tables.
        home: its module in `itm_fast.models` and its class there, as "scan:SCAN".
        paper: the paper's short name, venue and year.
        known: how much of the paper and its code is public.
        mark: the option by which its checkpoints are recognised, and that option's value; None: any value.
        options: its own options, in addition to the common ones.
        direction: the option that says whether words attend to regions or regions to words; "" if it has none.
        directions: values of that option, the default first.
        also: an option that only this model's published checkpoints have, which have no `mark`; "" if none.
        differs: other option values for a recipe ("coco"), a direction ("i2t"), or a pair of them ("coco i2t").
    """

    name: str
    title: str
    home: str
    paper: str
    known: str
    mark: tuple[str, str | None]
    options: Mapping[str, Option] = field(default_factory=dict)
    direction: str = ""
    directions: tuple[str, ...] = ()
    also: str = ""
    differs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def model(self) -> type[Matcher]:
        """The class, imported now."""
        module, name = self.home.split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    def published(self, recipe: str, direction: str | None) -> dict[str, Any]:
        """All options as published, by name.

        >>> from itm_fast.models._catalogue import CATALOGUE
        >>> found = CATALOGUE["scan"].published("coco", "i2t")
        >>> found["lambda_softmax"], found["lambda_lse"], found["learning_rate"]
        (4.0, 20.0, 0.0005)
        """
        chosen = {name: option.default for name, option in {**COMMON, **self.options}.items()}
        option, value = self.mark
        chosen |= {**RECIPES[recipe], option: value}
        if self.direction:
            chosen[self.direction] = direction
        for key in (recipe, direction, f"{recipe} {direction}"):
            chosen |= self.differs.get(str(key), {})
        # Lists are copied, so that a run cannot change those of the catalogue.
        return {name: list(value) if isinstance(value, list) else value for name, value in chosen.items()}
