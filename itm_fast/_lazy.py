"""Packages that import their public names on first use, so that `itm-fast --help` does not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy(
    package: str, names: Collection[str], parts: Collection[str] = (), homes: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Make a package's `__getattr__`, which imports the package's module `_public` when a name is first used.

    Args:
        package: the package's name.
        names: the names that `_public` defines.
        parts: modules and packages inside the package, each imported on first use.
        homes: further name -> the part that defines it, which is imported when the name is first used.
    """
    elsewhere = homes or {}

    def __getattr__(name: str) -> Any:
        if name in parts:
            return importlib.import_module(f"{package}.{name}")
        if name in elsewhere:
            return getattr(importlib.import_module(f"{package}.{elsewhere[name]}"), name)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        public = importlib.import_module(f"{package}._public")
        vars(sys.modules[package]).update({each: getattr(public, each) for each in names})
        return getattr(public, name)

    if "pdoc" in sys.modules:  # it documents what a package's dictionary holds, and asks for no name
        vars(sys.modules[package]).update({each: __getattr__(each) for each in (*names, *elsewhere)})
    return __getattr__
