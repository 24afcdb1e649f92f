"""Which backend runs: argument, context, environment or automatic choice; refusals; the scratch limit."""

import contextlib
import os
import shutil
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from white_box import native_level

import itm_fast
from itm_fast import _backends, _native
from itm_fast._checks import matmul_precision
from itm_fast._workspace import current_gib
from itm_fast.ops import _examples as examples
from itm_fast.ops import _register
from itm_fast.ops._declare import DECLARED
from itm_fast.testing import inputs, op_checks


@pytest.fixture
def asked(monkeypatch):
    """The backend that the registered op is called with."""
    seen = []
    real = _backends.resolve

    def spy(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(_register, "resolve", spy)
    return seen


def score(backend=None):
    return itm_fast.cross_attention_score(*inputs(2, (3, 2), 4, 8), backend=backend)


def automatic():
    """The first backend offered that can run on a CPU; Triton's, interpreted, only where it is asked for."""
    offered = _backends.OFFERS["cross_attention_score"]
    return next(n for n in offered if n != "triton" and _backends.why_not(n, "cpu") is None)


def test_the_cpu_backend_runs_wherever_a_compiler_is():
    # Tests of the kernels are skipped where they cannot run: that they can is said here.
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    reason = itm_fast.why_not("cpu")
    if compiler is None:
        assert "no C++ compiler on PATH" in reason
    else:
        assert reason is None
        assert _native.outcome().level == native_level()


def test_auto_takes_the_first_backend_offered_that_can_run(asked):
    score()
    assert asked == [automatic()]


def test_argument_beats_context_beats_environment(asked, monkeypatch):
    monkeypatch.setenv("ITM_FAST_BACKEND", "reference")
    score()
    with itm_fast.use_backend("torch"):
        score()
        score("reference")
    assert asked == ["reference", "torch", "reference"]


def test_the_context_ends_with_the_block(asked):
    with pytest.raises(RuntimeError), itm_fast.use_backend("reference"):
        raise RuntimeError
    score()
    assert asked == [automatic()]


def test_recorded_notes_the_backend_of_every_op_of_this_thread():
    with _backends.recorded() as ran:
        score()
        itm_fast.hardest_negative_loss(torch.eye(3), backend="reference")
        thread = threading.Thread(target=score, args=("reference",))
        thread.start()
        thread.join()
        score()
    score("reference")
    assert ran == {"cross_attention_score": automatic(), "hardest_negative_loss": "reference"}
    with _backends.recorded() as ran:
        for name in ("torch", "reference", "torch"):
            score(name)
    assert ran == {"cross_attention_score": "torch, reference"}


def test_recorded_notes_the_choice_of_a_compiled_function():
    compiled = torch.compile(itm_fast.cross_attention_score, backend="eager", fullgraph=True)
    with _backends.recorded() as ran:
        compiled(*inputs(2, (3, 2), 4, 8), backend="torch")
    assert ran == {"cross_attention_score": "torch"}


def test_an_unknown_name_is_refused_with_the_list(monkeypatch):
    for ask in (lambda: score("tirton"), lambda: itm_fast.use_backend("tirton").__enter__()):
        with pytest.raises(ValueError, match=r"'tirton'; choose auto, triton, cuda, cpu, torch, reference"):
            ask()
    monkeypatch.setenv("ITM_FAST_BACKEND", "tirton")
    with pytest.raises(ValueError, match="tirton"):
        score()


@pytest.mark.parametrize("name", _backends.NAMES)
def test_an_explicit_backend_runs_or_says_why_not(name):
    reason = itm_fast.why_not(name, "cpu")
    if reason is None:
        assert score(name).shape == (2, 2)
    else:
        with pytest.raises(NotImplementedError) as refusal:
            score(name)
        assert reason in str(refusal.value)


@pytest.mark.parametrize("name", ["triton", "cuda", "cpu"])
@pytest.mark.parametrize("place", ["context", "environment"])
def test_an_op_without_kernels_runs_in_torch_beside_kernels_chosen_for_all(name, place, monkeypatch):
    def resolved():
        return _backends.resolve("hardest_negative_loss", None, torch.device("cpu"))

    def loss(backend=None):
        return itm_fast.hardest_negative_loss(torch.tensor([[0.9, 0.1], [0.8, 0.5]]), backend=backend)

    if place == "environment":
        monkeypatch.setenv("ITM_FAST_BACKEND", name)
    with itm_fast.use_backend(name) if place == "context" else contextlib.nullcontext():
        assert (resolved(), loss().item()) == ("torch", pytest.approx(0.6))
        with pytest.raises(NotImplementedError, match=name):
            loss(name)
        with itm_fast.use_backend("reference"):
            assert resolved() == "reference"


def test_an_op_with_kernels_of_another_kind_chooses_itself_where_those_chosen_for_all_run(monkeypatch):
    monkeypatch.setitem(_backends.OFFERS, "cross_attention_score", ("triton", "torch", "reference"))
    monkeypatch.setattr(_native, "why_not", lambda: None)
    with itm_fast.use_backend("cpu"), _backends.recorded() as ran:
        score()
        with pytest.raises(NotImplementedError, match="cross_attention_score has no such backend; it offers triton, t"):
            score("cpu")
    assert ran == {"cross_attention_score": "torch"}
    monkeypatch.setattr(_native, "why_not", lambda: "no compiler")
    with itm_fast.use_backend("cpu"), pytest.raises(NotImplementedError, match="cpu: no compiler"):
        score()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_tensors_without_cuda():
    assert "CUDA" in itm_fast.why_not("torch", "cuda")


@pytest.fixture
def compilerless(monkeypatch):
    """A process whose C++ kernels could not be built, and an op that has them."""
    monkeypatch.setattr(_native, "_outcome", "no C++ compiler on PATH; install g++")
    monkeypatch.setattr(_backends, "_told", set())
    monkeypatch.setitem(_backends.OFFERS, "cross_attention_score", ("cpu", "torch", "reference"))


def test_auto_goes_on_without_a_compiler_and_says_so_once(compilerless):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(score(), score("torch"))
        score()
    (warning,) = told
    assert "slower torch backend" in str(warning.message)
    assert "no C++ compiler on PATH; install g++. Setting ITM_FAST_BACKEND=torch silences" in str(warning.message)
    assert warning.filename == __file__


def test_the_chosen_torch_backend_needs_no_compiler_and_no_warning(compilerless, asked, monkeypatch):
    monkeypatch.setenv("ITM_FAST_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score()
    assert asked == ["torch"]


def test_an_explicit_cpu_without_a_compiler_is_refused(compilerless):
    with pytest.raises(NotImplementedError, match=r"cpu: no C\+\+ compiler on PATH; install g\+\+$"):
        score("cpu")


def test_a_compiler_is_asked_for_only_where_the_kernels_could_run(compilerless, monkeypatch):
    monkeypatch.setattr(_native, "why_not", lambda: pytest.fail("asked"))
    assert _backends.why_not("cpu", "meta") == "needs CPU tensors, got meta"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backends.resolve("cross_attention_score", None, torch.device("meta")) == "torch"


def test_workspace_bounds_scratch_and_is_restored():
    from itm_fast._workspace import scratch_bytes

    before = scratch_bytes(torch.device("cpu"))
    with itm_fast.workspace(0.5):
        assert scratch_bytes(torch.device("cpu")) == 1 << 29
    assert scratch_bytes(torch.device("cpu")) == before
    for gib in (-1, 0, float("nan")):
        with pytest.raises(ValueError, match=f"more than 0, got {gib}"), itm_fast.workspace(gib):
            pass


@pytest.mark.parametrize("op", sorted(_backends.OFFERS))
def test_backward_has_the_workspace_and_the_backend_of_its_forward(op, monkeypatch):
    portable, seen = DECLARED[op].implementation("torch"), []

    def backward(*args, **kept):
        seen.append(current_gib())
        return portable.backward(*args, **kept)

    spied = SimpleNamespace(**{**vars(portable), "backward": backward})
    monkeypatch.setattr(DECLARED[op], "implementation", lambda backend: spied)
    args = [a.requires_grad_() if a.is_floating_point() else a for a in examples.example(op) if torch.is_tensor(a)]
    with itm_fast.workspace(0.125), itm_fast.use_backend("torch"):
        more = [a for a in examples.example(op) if not torch.is_tensor(a)]
        result = op_checks.first(getattr(itm_fast, op)(*args, *more))
    with itm_fast.workspace(0.5), itm_fast.use_backend("reference"):
        result.sum().backward()
    assert set(seen) == {0.125}


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has no such switches")
@pytest.mark.parametrize("library,value,read", [("cuda", "tf32", "high"), ("mkldnn", "bf16", "highest")])
def test_torchs_newer_switches_of_precision_are_read(library, value, read):
    switches = getattr(torch.backends, library).matmul
    image, words, cu_seqlens = inputs(2, (3, 2), 4, 8)
    want, before = itm_fast.cross_attention_score(image, words, cu_seqlens), switches.fp32_precision
    switches.fp32_precision = value
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert matmul_precision() == read
        score = itm_fast.cross_attention_score(image, words, cu_seqlens)
    finally:
        switches.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
    assert matmul_precision() == "highest"
    torch.testing.assert_close(score, want)
