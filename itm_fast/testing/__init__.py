"""Inputs, the one accuracy rule, and each paper's own slow loop (`testing.scan`, `testing.sgraf`)."""

from __future__ import annotations

from ..ops._draws import inputs
from .accuracy import assert_accurate, rounding

__all__ = ["assert_accurate", "inputs", "rounding"]
