"""Conventions of this repository that a program can check."""

import collections
import doctest
import importlib
import inspect
import pkgutil
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import itm_fast
from itm_fast import _backends, ops
from itm_fast.ops._declare import DECLARED

ROOT = Path(__file__).resolve().parents[1]
checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")
TOP_LEVEL = {"pyproject.toml", "itm_fast", "kernels", "csrc", "benchmarks", "tests"}
TOP_LEVEL |= {"README.md", "LICENSE", "CITATION.cff"}
# Not all of itm_fast.__path__: in a checkout its second entry is the whole repository.
MODULES = [
    "itm_fast",
    "itm_fast.kernels",
    *(m.name for m in pkgutil.walk_packages(itm_fast.__path__[:1], "itm_fast.") if m.name != "itm_fast.__main__"),
]


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines()]


@checkout
def test_the_top_level_is_fixed():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {n for n in names if not n.startswith(".")} <= TOP_LEVEL


@checkout
def test_no_two_headers_of_cpp_declare_one_name():
    """Two structs of one name in one library are undefined behaviour: the linker keeps one of their functions."""
    names = collections.Counter()
    for header in (ROOT / "csrc" / "cpu").rglob("*.h"):
        names.update(re.findall(r"^(?:struct|class) (\w+)", header.read_text(), re.MULTILINE))
    assert len(names) > 10
    assert [name for name, count in names.items() if count > 1] == []


@checkout
def test_files_stay_short():
    files = tracked("*.py", "*.cpp", "*.h", "*.cu")
    assert not {p.name: n for p in files if (n := len(p.read_text().splitlines())) > 400}


@checkout
def test_lines_of_kernels_stay_short():
    """As ruff holds those of Python to."""
    found = []
    for path in tracked("csrc/*", "tests/cuda/*", "tests/amx/*"):
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in lines if len(line) > 120]
    assert not found


@checkout
def test_constants_of_kernels_stand_to_the_right_of_tensors():
    """Triton 3.8's interpreter makes `constant * tensor` a constant, which the next comparison refuses."""
    texts = {path: path.read_text() for path in tracked("kernels/*.py")}
    constants = re.findall(r"^([A-Z_]+) = tl\.constexpr", "\n".join(texts.values()), re.MULTILINE)
    left = re.compile(rf"(?<![*/] )\b(?:{'|'.join(constants)}) [-+*/]")
    assert "EPS" in constants
    found = [f"{path.name}: {line}" for path, text in texts.items() for line in text.splitlines() if left.search(line)]
    assert not found


@checkout
def test_no_loose_ends_machine_paths_or_hosts():
    # Spelled in pieces so that this file does not match itself.
    words = ["TO" + "DO", "FIX" + "ME", "XX" + "X", r"(?<![\w.])/wo" + "rk/", r"(?<![\w.])/tm" + "p/"]
    banned = re.compile("|".join(words))
    found = []
    for path in tracked("*.py", "*.md", "*.toml", "*.sh", ".ci/*", "*.cu", "*.cpp", "*.h"):
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if banned.search(line):
                found.append(f"{path.relative_to(ROOT)}:{n}: {line.strip()}")
    assert not found


@checkout
@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_has_its_files(op):
    stem = DECLARED[op].stem
    home = {str(p.relative_to(ROOT)) for p in tracked(f"*{stem}*")}
    places = ("itm_fast/ops/{}.py", "itm_fast/ops/_torch/{}.py", "tests/test_{}.py", "benchmarks/bench_{}.py")
    assert {place.format(stem) for place in places} <= home


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_file_has_the_same_anatomy(op):
    module = sys.modules[f"itm_fast.ops.{DECLARED[op].stem}"]
    assert _backends.OFFERS[op] == module.OFFERED
    assert module.OFFERED[-1] == "reference"
    assert set(module.OFFERED) <= set(_backends.NAMES)
    doc = module.__doc__
    assert "equals this program" in doc
    assert "Backward" in doc
    assert "Saved for backward" in doc
    assert inspect.isfunction(module.reference)
    public = getattr(module, op)
    assert public is getattr(itm_fast, op)
    for section in ("Args:", "Returns:", "Raises:", ">>> "):
        assert section in inspect.getdoc(public)
    assert inspect.signature(public).parameters["backend"].default is None


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_its_examples_run(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    failures, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


def test_a_test_begins_with_seeded_generators():
    drawn = random.random(), torch.rand(()).item()
    random.seed(0)
    torch.manual_seed(0)
    assert drawn == (random.random(), torch.rand(()).item())
