"""Random inputs, the accuracy rule of all tests, checks of ops, and each paper's slow loop (`testing.scan`, ...)."""

from __future__ import annotations

from ..ops._draws import inputs
from .accuracy import assert_accurate, rounding

__all__ = ["assert_accurate", "inputs", "rounding"]
