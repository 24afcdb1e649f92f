"""What the options of a model describe: its row of the catalogue, its name in tables, and whether they are in range."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from ._catalogue import CATALOGUE
from ._entry import Entry
from ._options import COMMON, MARKS

_KNOWN = {**MARKS, **COMMON, **{name: option for row in CATALOGUE.values() for name, option in row.options.items()}}


def recognised(opt: Namespace) -> Entry:
    """The row of the model that the options of a checkpoint describe.

    Args:
        opt: SGRAF's options have `module_name`, SCAN's have `cross_attn`, those of other models `system` or, in their
            published checkpoints, the option `also` of their row.

    Raises:
        ValueError: they have none of these, or `system` is unknown.

    >>> recognised(Namespace(cross_attn="i2t")).title
    'SCAN'
    """
    mark = marked(opt)
    if mark is None:
        raise ValueError(
            "build: opt has neither module_name (SGRAF) nor cross_attn (SCAN) nor system (the others), so no model "
            "fits it"
        )
    rows = [row for row in CATALOGUE.values() if mark in (row.mark[0], row.also)]
    for row in rows:
        if mark == row.also or row.mark[1] in (None, getattr(opt, mark)):
            return row
    if mark == "system":
        known = ", ".join(sorted(str(row.mark[1]) for row in rows))
        raise ValueError(f"build: opt.system must be one of {known}, got {opt.system!r}")
    return rows[0]  # its class refuses the value


def marked(opt: Namespace) -> str | None:
    """The option by which the model is recognised; None if the options have none."""
    known = "system", "module_name", *(row.also for row in CATALOGUE.values() if row.also), "cross_attn"
    return next((name for name in known if hasattr(opt, name)), None)


def title(opt: Namespace) -> str:
    """The name in tables of the model that these options describe.

    >>> title(Namespace(cross_attn="t2i")), title(Namespace(module_name="SAF"))
    ('SCAN t2i', 'SAF')
    """
    row = recognised(opt)
    return f"{row.title} {getattr(opt, row.direction)}" if row.direction else row.title


def check(values: Mapping[str, Any], spell: Callable[[str], str] = str) -> None:
    """Refuse options with which no model can be built or trained; nothing is built.

    Args:
        values: options by their published names. Where they say which model it is, its own ranges hold. Options that
            no model has are not looked at.
        spell: returns the name that a message uses for an option.

    Raises:
        ValueError: a value is of another type, not finite, or out of its range.

    >>> check({"sim_dim": 0})
    Traceback (most recent call last):
    ValueError: sim_dim must be at least 1, got 0
    """
    opt = Namespace(**values)
    known = _KNOWN if marked(opt) is None else {**_KNOWN, **recognised(opt).options}
    for name, value in values.items():
        if name in known:
            known[name].check(spell(name), value)
