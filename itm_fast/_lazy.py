"""Packages that import what they offer when a name is first asked for: `itm-fast --help` need not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection
from typing import Any


def lazy(package: str, names: Collection[str], parts: Collection[str] = ()) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose module `_public` holds these names; the first one imports it.

    Args:
        package: its name.
        names: what `_public` holds.
        parts: modules and packages inside it, imported when they are asked for.
    """

    def __getattr__(name: str) -> Any:
        if name in parts:
            return importlib.import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        public = importlib.import_module(f"{package}._public")
        vars(sys.modules[package]).update({each: getattr(public, each) for each in names})
        return getattr(public, name)

    return __getattr__
