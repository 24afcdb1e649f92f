"""Where the white-box module cannot be built, its tests are skipped with a reason."""

import sys

from white_box import load

from itm_fast import _native


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load.__wrapped__(_native.level()).startswith("CXX names 'no-such-compiler', which cannot be run")


def test_without_pybind11(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert load.__wrapped__(_native.level()).startswith("no pybind11 to build the white box module with")


def test_on_a_lesser_processor(monkeypatch):
    monkeypatch.setattr(_native, "level", lambda: "generic")
    assert load.__wrapped__("avx2") == "this processor has no avx2 instructions"
