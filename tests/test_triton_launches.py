"""What a kernel is compiled by depends on no count or length, so that other data compile nothing new."""

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from triton_cases import unless

import itm_fast
from itm_fast import _backends, _checks, packing
from itm_fast.ops import _examples as examples
from itm_fast.ops import _recompute
from itm_fast.testing import op_checks

OPS = [op for op in sorted(_backends.OFFERS) if "triton" in _backends.OFFERS[op]]
SIZES = [((5, (13, 1, 4, 4, 7, 20)), 1.0), ((4, (12, 2, 16)), 2.0**-14)]
OTHERS = [((1, (9,)), 1.0), ((7, (3, 30, 1, 8, 16)), 2.0**-13), ((8, (16, 16)), 1.0)]


@pytest.fixture
def launched(monkeypatch):
    """Every kernel that is launched under the interpreter, with what it would be compiled by."""
    from triton.runtime.interpreter import GridExecutor

    seen, real = set(), GridExecutor.__call__

    def spy(self, *args, **kwargs):
        known = set(inspect.signature(self.fn).parameters)
        options = tuple(sorted((k, v) for k, v in kwargs.items() if k not in known))
        given = inspect.signature(self.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in known}).arguments
        values = tuple((name, given[name]) for name in self.constexprs if name in given)
        dtypes = tuple(str(a.dtype) for a in given.values() if isinstance(a, torch.Tensor))
        seen.add((self.fn.__name__, values, dtypes, options))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", spy)
    return seen


def arguments(op, size):
    images, lengths = size
    args = examples.example(op, examples.Size(images, lengths, 9, 32, 16, 2))
    floats = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
    return [a.float().requires_grad_() if f else a for a, f in zip(args, floats)]


def run(op, args, gib=1.0):
    with itm_fast.workspace(gib):
        result = op_checks.first(getattr(itm_fast, op)(*args, backend="triton"))
        result.backward(op_checks.upstream(result))


@pytest.mark.slow
@unless("triton", "cpu")
@pytest.mark.parametrize("op", OPS)
def test_no_count_or_length_is_compiled_in(op, launched):
    for size, gib in SIZES:
        run(op, arguments(op, size), gib)
    known = set(launched)
    assert known
    for size, gib in OTHERS:
        run(op, arguments(op, size), gib)
    assert launched - known == set()


@pytest.mark.slow
@unless("triton", "cpu")
@pytest.mark.parametrize("op", OPS)
def test_the_bounds_are_copied_to_the_host_once(op, monkeypatch):
    """On a GPU every question waits until the device has done all before it. Backward of a score asks one of the
    gradient: whether few pairs have one."""
    monkeypatch.setattr(packing, "READ_ANEW", ())  # as for tensors on a GPU
    args, asked = arguments(op, SIZES[0][0]), Counter()
    for name in ("tolist", "item", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name, real=real: asked.update([name]) or real(x))
    run(op, args)
    assert asked["tolist"] > 0
    asked.clear()
    run(op, args)
    assert not asked["tolist"]
    asked.clear()
    with torch.no_grad():
        getattr(itm_fast, op)(*args, backend="triton")
    assert not asked


@pytest.mark.slow
@unless("triton", "cpu")
def test_a_graph_captured_after_a_backward_pass_of_few_pairs_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(packing, "READ_ANEW", ())  # as for tensors on a GPU
    capturing = [False]
    for module in (_checks, _recompute):
        monkeypatch.setattr(module, "capturing", lambda device: capturing[0])
    args = arguments("similarity_graph_score", (4, (2, 1, 3)))
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def backward(grad, captured):
        capturing[0] = captured
        with itm_fast.use_backend("triton"):
            return torch.autograd.grad(itm_fast.similarity_graph_score(*args), leaves, grad)

    every, one = torch.ones(4, 3), torch.zeros(4, 3)
    one[2, 1] = 1
    backward(one, False)
    with pytest.raises(RuntimeError, match=r"lengths \[4\] cannot be read while .* a gradient of every pair's score"):
        backward(every, True)
    for a, b in zip(backward(every, False), backward(every, True), strict=True):
        assert torch.equal(a, b)


PROGRAM = """
import importlib, json, sys
from itm_fast.kernels import _tiles

found = []
for name in sys.argv[1:]:
    module = importlib.import_module(f"itm_fast.kernels.{name}")
    for arch in (80, 90, 100):
        for row in module.compilations(arch):
            names = [p.name for p in row.kernel.params if not p.is_constexpr and p.name not in row.constants]
            special = {p.name for p in row.kernel.params if not p.do_not_specialize}
            types = dict(zip([n for n in row.kernel.arg_names if n in names], row.types.split()))
            found += [(row.kernel.__name__, n) for n, t in types.items() if t[0] == "i" and n in special]
print(json.dumps(sorted(set(found))))
"""


def test_no_integer_is_specialised():
    # Triton compiles anew for an integer of 1 and for one that 16 divides, unless it is told not to.
    pytest.importorskip("triton", reason="triton is not installed")
    package = Path(itm_fast.__file__).resolve().parent
    folder = package / "kernels" if (package / "kernels").is_dir() else package.parent / "kernels"
    files = sorted(p.stem for p in folder.glob("*.py") if "def compilations(" in p.read_text())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(package.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
