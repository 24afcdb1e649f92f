"""When the CUDA kernels run, what takes their place, and whose backward pass follows: no GPU is needed to test it."""

import contextlib
import sys
import types
import warnings
from functools import partial

import pytest
import torch

import itm_fast
from itm_fast import _backends, _cuda, _triton
from itm_fast._cuda import driver, nvrtc
from itm_fast.ops import _attention, _first_use, _register, similarity_score
from itm_fast.ops import _examples as examples
from itm_fast.ops._declare import DECLARED

DEVICE = torch.device("cuda", 0)
OP = "similarity_graph"


@pytest.fixture
def gpu(monkeypatch):
    """A process that sees a GPU, on which an op has kernels in Triton and CUDA; what it sees can be changed."""
    seen = types.SimpleNamespace(capability=(9, 0), checked=[], finds={})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(_backends.OFFERS, OP, ("triton", "cuda", "cpu", "torch", "reference"))
    monkeypatch.setattr(_first_use, "_verdicts", {})
    monkeypatch.setattr(_backends, "_told", set())
    monkeypatch.setattr(_triton, "_unusable", lambda: None)
    monkeypatch.setattr(_first_use, "_compiler", lambda backend: f"{backend} 9.9.9")
    library = nvrtc.Library(None, "none", "13.5", (75, 80, 90))
    monkeypatch.setattr(nvrtc, "_found", lambda: library)
    monkeypatch.setattr(driver, "_found", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: seen.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def problem(op, backend, device, dtype, backward):
        seen.checked.append(backend)
        return seen.finds.get(backend)

    monkeypatch.setattr(examples, "problem", problem)
    return seen


@contextlib.contextmanager
def autocast(dtype):
    """torch.autocast for CUDA, which itself wants a real GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def resolve(backend=None, dtype=torch.float32, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _backends.resolve(OP, backend, DEVICE, dtype, put_aside=_first_use.put_aside, **more)


def test_an_explicit_request_is_checked_once_and_honoured(gpu):
    assert [resolve("cuda") for _ in range(2)] == ["cuda"] * 2
    assert gpu.checked == ["cuda"]


def test_auto_takes_triton_first_and_cuda_where_triton_refuses(gpu):
    assert resolve() == "triton"
    gpu.capability = (7, 5)
    assert resolve() == "cuda"
    assert gpu.checked == ["triton", "cuda"]


def test_triton_put_aside_leaves_cuda(gpu):
    gpu.finds = {"triton": "a result is off by 0.3"}
    assert resolve() == "cuda"
    assert gpu.checked == ["triton", "cuda"]


def test_both_put_aside_are_told_in_one_warning(gpu):
    gpu.finds = {"triton": "a result is off by 0.3", "cuda": "a result is off by 7"}
    said = (
        r"slower torch backend, as its Triton kernels cannot run: similarity_graph .*, triton 9\.9\.9\): a result is "
        r"off by 0\.3; its CUDA kernels cannot run: similarity_graph in float32 failed its check on cuda:0 "
        r"\(NVIDIA Test, cuda 9\.9\.9\): a result is off by 7\. Setting"
    )
    with pytest.warns(UserWarning, match=said):
        assert _backends.resolve(OP, None, DEVICE, torch.float32, put_aside=_first_use.put_aside) == "torch"
    assert resolve() == "torch"
    with pytest.raises(NotImplementedError, match=r"cannot run on cuda:0: cuda: similarity_graph in float32 failed"):
        resolve("cuda")


def test_sizes_that_are_too_large_for_one_are_the_others(gpu):
    assert resolve(too_large={"triton": "too many regions"}.get) == "cuda"
    with pytest.raises(NotImplementedError, match=r"cuda: too many words$"):
        resolve("cuda", too_large={"cuda": "too many words"}.get)


def test_float64_names_torch_and_bfloat16_needs_a_newer_gpu(gpu):
    assert resolve(dtype=torch.float64) == "torch"
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels .* take no float64; torch and reference do$"):
        resolve("cuda", torch.float64)
    gpu.capability = (7, 5)
    assert itm_fast.why_not("cuda", DEVICE) is None
    with pytest.warns(UserWarning, match="compute capability 7.5 cannot multiply bfloat16"):
        assert _backends.resolve(OP, None, DEVICE, torch.bfloat16) == "torch"
    with autocast(torch.bfloat16), pytest.raises(NotImplementedError, match="cannot multiply bfloat16"):
        resolve("cuda")


def backward(too_large=None):
    return _backends.backward_of_cuda(OP, DEVICE, torch.float32, too_large, _first_use.put_aside)


def test_the_backward_pass_is_tritons_where_it_can_run(gpu):
    assert backward() == "triton"
    assert backward({"triton": "too many regions"}.get) == "torch"
    gpu.capability = (7, 5)
    assert backward() == "torch"


def test_the_backward_pass_is_torchs_where_triton_is_put_aside(gpu):
    gpu.finds = {"triton": "a gradient is off by 0.3"}
    assert backward() == "torch"


@pytest.fixture
def on_cpu(monkeypatch):
    """Kernels called cuda and triton that are PyTorch's and run on the CPU, and what has run of them."""
    from itm_fast.ops._torch import similarity_graph as portable

    ran = []

    def noted(name, function):
        def run(*args, **kept):
            ran.append(name)
            return function(*args, **kept)

        return run

    monkeypatch.setitem(_backends.OFFERS, OP, ("triton", "cuda", "cpu", "torch", "reference"))
    monkeypatch.setattr(_first_use, "_verdicts", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in (_triton, _cuda):
        monkeypatch.setattr(module, "why_not", lambda device, dtype: None)
    for package in ("kernels", "ops._cuda"):
        kernels = types.SimpleNamespace(forward=noted(f"{package} forward", portable.forward))
        if package == "kernels":
            kernels.backward = noted(f"{package} backward", portable.backward)
        monkeypatch.setitem(sys.modules, f"itm_fast.{package}.{OP}", kernels)
    monkeypatch.setattr(portable, "backward", noted("torch backward", portable.backward))
    monkeypatch.setattr(_register, "put_aside", lambda *_: None)
    return ran


def gradients(backend):
    args = [a.float() if a.is_floating_point() else a for a in examples.example(OP)]
    leaves = [a.requires_grad_() for a in args if a.is_floating_point()]
    return torch.autograd.grad(itm_fast.similarity_graph(*args, backend=backend).cos().sum(), leaves)


def test_a_forward_pass_in_cuda_has_the_gradients_of_another_backend(on_cpu, monkeypatch):
    want = gradients("torch")
    on_cpu.clear()
    for found in (gradients("cuda"), want):
        for mine, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert on_cpu == ["ops._cuda forward", "kernels backward"]
    monkeypatch.setattr(_triton, "why_not", lambda device, dtype: "needs a newer GPU")
    on_cpu.clear()
    gradients("cuda")
    assert on_cpu == ["ops._cuda forward", "torch backward"]


def test_sizes_that_triton_refuses_have_the_backward_pass_of_torch(on_cpu, monkeypatch):
    seen = []

    def too_large(backend, size, given):
        seen.append((backend, size["S"], given["cu_seqlens"].tolist() if "cu_seqlens" in given else sorted(given)))
        return "too large" if backend == "triton" else None

    monkeypatch.setattr(DECLARED[OP], "too_large", too_large)
    gradients("cuda")
    assert on_cpu == ["ops._cuda forward", "torch backward"]
    (forward, *sizes), (backward, *again) = seen
    assert (forward, backward) == ("cuda", "triton")
    assert sizes == again
    with pytest.raises(NotImplementedError, match="triton: too large"):
        gradients("triton")


def test_a_call_of_cuda_compiles_into_one_graph(on_cpu, monkeypatch):
    monkeypatch.setattr(DECLARED[OP], "too_large", lambda backend, size, given: None)
    torch.compiler.reset()
    args = [a.float() if a.is_floating_point() else a for a in examples.example(OP)]
    call = torch.compile(lambda *a: itm_fast.similarity_graph(*a, backend="cuda"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(*args), itm_fast.similarity_graph(*args, backend="torch"))
    assert on_cpu == ["ops._cuda forward"]


def test_a_compiled_call_chooses_by_the_lengths_that_it_gets(on_cpu, monkeypatch):
    def too_large(name, size, given):
        if name != "cuda" or torch.compiler.is_compiling():
            return None
        return "too long" if given["cu_seqlens"].diff().max() > 5 else None

    monkeypatch.setattr(DECLARED[OP], "too_large", too_large)
    monkeypatch.setitem(_backends.OFFERS, OP, ("cuda", "torch"))
    monkeypatch.setattr(_backends, "_warn_once", lambda *_: None)
    torch.compiler.reset()
    nodes, _, *weights = [a.float() if a.is_floating_point() else a for a in examples.example(OP)]
    nodes.requires_grad_()
    call = torch.compile(itm_fast.similarity_graph, fullgraph=True, backend="aot_eager")
    for length, ran in ((5, "cuda"), (6, "torch"), (5, "cuda")):
        bounds = torch.tensor([0, length, 9], dtype=torch.int32)
        with _backends.recorded() as noted:
            found = call(nodes, bounds, *weights)
        assert noted == {OP: ran}
        want = itm_fast.similarity_graph(nodes, bounds, *weights, backend="torch")
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(*(torch.autograd.grad(x.cos().sum(), nodes)[0] for x in (found, want)))
    assert on_cpu.count("ops._cuda forward") == 2


@pytest.mark.parametrize("capability, asked", [((9, 0), []), ((7, 5), ["cuda"])])
def test_lengths_on_a_gpu_are_read_only_for_the_kernels_that_need_them(gpu, monkeypatch, capability, asked):
    """Reading them waits for the GPU; and of fake tensors, which stand for the GPU's here, there are none."""
    seen = []
    monkeypatch.setitem(_backends.OFFERS, "cross_attention_score", ("triton", "cuda", "torch", "reference"))
    op = DECLARED["cross_attention_score"]
    real = op.too_large

    def too_large(name, size, given):
        if name == "cuda":
            seen.append(name)
        return real(name, size, given)

    monkeypatch.setattr(op, "too_large", too_large)
    gpu.capability = capability
    with torch._subclasses.FakeTensorMode(), _backends.recorded() as ran:
        image, words = torch.empty(2, 36, 64, device="cuda"), torch.empty(5, 64, device="cuda")
        bounds = torch.empty(3, dtype=torch.int32, device="cuda")
        assert itm_fast.cross_attention_score(image, words, bounds).shape == (2, 2)
    assert seen == asked
    assert ran == {"cross_attention_score": "cuda" if asked else "triton"}


def test_a_pair_scorer_takes_fake_captions():
    size = dict(R=36, D=64, S=64)
    with torch._subclasses.FakeTensorMode():
        edge = torch.empty(3, dtype=torch.int32, device=DEVICE)
    given = dict(cu_seqlens=edge, image=torch.empty(0))
    assert DECLARED["similarity_graph_score"].too_large("cuda", size, given) is None


def test_the_words_that_a_pair_scorer_takes_are_those_of_autocasts_dtype(gpu, monkeypatch):
    for module in (_attention, similarity_score):
        monkeypatch.setattr(module, "kept", lambda *args: 100)  # words of the longest caption
    given = dict(cu_seqlens=types.SimpleNamespace(device=DEVICE), image=torch.empty(0))
    too_large = partial(DECLARED["similarity_graph_score"].too_large, "cuda", dict(R=36, D=1024, S=256), given)
    said = "captions of at most 63 words for R = 36, S = 256 and float32, as this GPU has too little shared memory"
    assert too_large() == f"CUDA kernels take {said} for more, got 100"
    with autocast(torch.bfloat16):
        assert too_large() is None
