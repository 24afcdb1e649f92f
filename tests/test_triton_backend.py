"""When the Triton kernels run, what refuses them, and the check of their first use: no GPU is needed to test it."""

import functools
import sys
import threading
import types
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import itm_fast
from itm_fast import _backends, _triton
from itm_fast.ops import _examples as examples
from itm_fast.ops import _first_use
from itm_fast.ops._declare import DECLARED

CUDA = torch.device("cuda", 0)
OP = "similarity_graph"


@pytest.fixture
def gpu(monkeypatch):
    """A process that sees a GPU on which Triton runs; what it sees can be changed."""
    seen = types.SimpleNamespace(capability=(9, 0), capturing=False)
    _offer(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: seen.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    monkeypatch.setattr(_first_use, "_compiler", lambda backend: f"{backend} 9.9.9")
    return seen


def _offer(monkeypatch):
    """One op with Triton kernels, as in a process that has not used them."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(_backends.OFFERS, OP, ("triton", "cpu", "torch", "reference"))
    monkeypatch.setattr(_first_use, "_verdicts", {})
    monkeypatch.setattr(_triton, "_unusable", lambda: None)
    monkeypatch.setattr(_backends, "_told", set())


@pytest.fixture
def checks(monkeypatch):
    """Every check that is run; what each finds can be set."""
    seen = types.SimpleNamespace(ran=[], finds=None)

    def problem(op, backend, device, dtype, backward):
        seen.ran.append((op, device, dtype, backward))
        if isinstance(seen.finds, Exception):
            raise seen.finds
        return seen.finds

    monkeypatch.setattr(examples, "problem", problem)
    return seen


def resolve(backend=None, dtype=torch.float32, device=CUDA, op=OP):
    return _backends.resolve(op, backend, device, dtype, put_aside=_first_use.put_aside)


def test_auto_takes_triton_on_a_gpu_and_checks_it_once(gpu, checks):
    assert [resolve() for _ in range(3)] == ["triton"] * 3
    assert checks.ran == [(OP, CUDA, torch.float32, True)]


def test_each_device_dtype_and_precision_is_checked_and_backward_with_gradients_alone(gpu, checks):
    with torch.no_grad():
        resolve()
    resolve()
    with torch.no_grad():
        resolve()
    assert [ran[3] for ran in checks.ran] == [False, True]
    resolve(device=torch.device("cuda", 1))
    resolve(dtype=torch.float16)
    try:
        torch.set_float32_matmul_precision("high")
        resolve()
        resolve(dtype=torch.float16)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [ran[1:3] for ran in checks.ran[2:]] == [
        (torch.device("cuda", 1), torch.float32), (CUDA, torch.float16), (CUDA, torch.float32),
    ]  # fmt: skip


def test_under_autocast_the_dtype_that_it_computes_in_is_checked(gpu, checks):
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast itself wants a real GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        resolve()
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert checks.ran == [(OP, CUDA, torch.bfloat16, True)]


def test_an_op_that_fails_its_check_is_put_aside_with_one_warning(gpu, checks):
    checks.finds = "a result is off by 0.3 where 0.001 is allowed"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [resolve() for _ in range(2)] == ["torch"] * 2
    reason = (
        f"{OP} in float32 failed its check on cuda:0 (NVIDIA Test, triton 9.9.9): "
        "a result is off by 0.3 where 0.001 is allowed"
    )
    (warning,) = told
    assert "slower torch backend, as its Triton kernels cannot run: " + reason in str(warning.message)
    with pytest.raises(NotImplementedError) as refusal:
        resolve("triton")
    assert str(refusal.value) == f"{OP} cannot run on cuda:0: triton: {reason}"
    assert len(checks.ran) == 1
    checks.finds = None
    assert resolve(dtype=torch.float16) == "triton"


def test_threads_that_begin_together_check_once(gpu, checks, monkeypatch):
    second, problem = threading.Event(), examples.problem

    def slow(*args):
        if checks.ran:
            second.set()
        found = problem(*args)
        second.wait(0.3)  # while the other thread may begin a check of its own
        return found

    monkeypatch.setattr(examples, "problem", slow)
    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks.ran) == 1


def test_an_op_put_aside_on_its_first_use_is_recorded_as_what_ran_instead(gpu, checks):
    checks.finds = "a result is off by 0.3 where 0.001 is allowed"
    with pytest.warns(UserWarning, match="slower torch backend"), _backends.recorded() as ran:
        resolve()
    assert ran == {OP: "torch"}


def test_no_memory_for_the_check_says_nothing_about_the_kernels(gpu, checks):
    checks.finds = torch.OutOfMemoryError("CUDA out of memory")
    assert resolve() == "triton"
    checks.finds = None
    assert resolve() == "triton"
    assert len(checks.ran) == 2


def test_nothing_is_checked_while_a_graph_is_captured(gpu, checks):
    gpu.capturing = True
    assert resolve() == "triton"
    gpu.capturing = False
    assert checks.ran == []
    resolve()
    assert len(checks.ran) == 1


def test_float64_goes_to_the_next_backend_without_a_warning_and_is_refused_by_name(gpu, checks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(dtype=torch.float64) == "torch"
    with pytest.raises(NotImplementedError, match=r"triton: its kernels .* take no float64; torch and reference do"):
        resolve("triton", torch.float64)
    assert checks.ran == []
    assert itm_fast.why_not("triton", CUDA) is None


def test_an_older_gpu_is_refused_by_name(gpu, checks):
    gpu.capability = (7, 5)
    assert itm_fast.why_not("triton", CUDA) == (
        "needs a GPU of compute capability 8.0 or more, and NVIDIA Test has 7.5"
    )
    with pytest.warns(UserWarning, match=r"slower torch backend.*NVIDIA Test has 7\.5.*ITM_FAST_BACKEND=torch"):
        assert resolve() == "torch"


def test_rocm_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in itm_fast.why_not("triton", CUDA)


@pytest.mark.parametrize(
    "source,reason",
    [
        (None, "triton is not installed; `pip install triton`"),
        ("raise RuntimeError('built for another Python')", "triton does not import: RuntimeError: built for another"),
        ("import nowhere_at_all", "triton does not import: No module named 'nowhere_at_all'"),
    ],
)
def test_a_triton_that_is_absent_or_broken(source, reason, monkeypatch, tmp_path):
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "triton":
                raise ModuleNotFoundError("No module named 'triton'", name="triton")

    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    if source is None:
        monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    else:
        (tmp_path / "triton.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    assert _triton._unusable.__wrapped__().startswith(reason)


def test_cpu_tensors_need_the_interpreter_and_an_explicit_request(gpu, checks, monkeypatch):
    cpu = torch.device("cpu")
    assert itm_fast.why_not("triton", "cpu") == "needs CUDA tensors, got cpu"
    with pytest.raises(NotImplementedError, match="triton: needs CUDA tensors, got cpu"):
        resolve("triton", device=cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert itm_fast.why_not("triton", "cpu") is None
    assert resolve("triton", device=cpu) == "triton"
    assert resolve("triton", device=CUDA) == "triton"
    assert resolve(device=cpu) in ("cpu", "torch")
    with pytest.warns(UserWarning, match="only an explicit request wants"):
        assert resolve(device=CUDA) == "torch"
    assert itm_fast.why_not("triton", "meta") == "needs CUDA tensors, got meta"
    assert checks.ran == []


@pytest.fixture
def on_cpu(monkeypatch):
    """Kernels called triton that are PyTorch's and run on the CPU: what is checked is run for real."""
    from itm_fast.ops._torch import similarity_graph as portable

    _offer(monkeypatch)
    monkeypatch.setattr(_triton, "why_not", lambda device, dtype: None)
    monkeypatch.setitem(sys.modules, f"itm_fast.kernels.{OP}", portable)


def arguments(dtype=torch.float32):
    return [a.to(dtype) if a.is_floating_point() else a for a in examples.example(OP)]


def test_the_check_sees_none_of_the_callers_modes(on_cpu, monkeypatch):
    seen = []
    real = examples.problem

    def problem(*args):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), _backends.requested()))
        seen.append(real(*args))

    monkeypatch.setattr(examples, "problem", problem)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), itm_fast.use_backend("reference"):
        assert resolve("triton", device=torch.device("cpu")) == "triton"
    assert seen == [(True, False, "auto"), None]


def test_the_first_use_may_lie_in_a_compiled_graph(on_cpu):
    torch.compiler.reset()
    call = torch.compile(lambda *a: itm_fast.similarity_graph(*a), fullgraph=True, backend="aot_eager")
    want = itm_fast.similarity_graph(*arguments(), backend="torch")
    torch.testing.assert_close(call(*arguments()), want)
    assert list(_first_use._verdicts.values()) == [None]


def test_a_backward_pass_that_recomputes_does_not_check(on_cpu, checks):
    """On a GPU the check's own backward would wait for the thread that the recomputation holds."""
    nodes, *rest = arguments()
    nodes.requires_grad_()
    result = checkpoint(lambda x: itm_fast.similarity_graph(x, *rest), nodes, use_reentrant=True)
    assert [ran[3] for ran in checks.ran] == [False]  # forward is run without gradients
    result.sum().backward()
    assert nodes.grad.isfinite().all()
    assert [ran[3] for ran in checks.ran] == [False]
    itm_fast.similarity_graph(nodes, *rest)
    assert [ran[3] for ran in checks.ran] == [False, True]


def test_the_first_use_may_lie_under_fake_tensors(on_cpu):
    real = arguments()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) for a in real]
        assert itm_fast.similarity_graph(*fakes).shape == (3, 2, 8)
    assert list(_first_use._verdicts.values()) == [None]


@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "crash"])
def test_the_check_finds(fault, monkeypatch):
    real = itm_fast.similarity_graph

    @functools.wraps(real)
    def broken(nodes, *args, backend):
        result = real(nodes, *args, backend=backend)
        if backend == "reference":
            return result
        if fault == "crash":
            raise RuntimeError("out of resource: shared memory\nmore of it")
        if fault == "gradient":
            return result + 0.1 * (nodes.sum() - nodes.sum().detach())
        return result * (1.01 if fault == "value" else float("nan"))

    monkeypatch.setattr(DECLARED[OP], "function", broken)
    found = examples.problem(OP, "torch", torch.device("cpu"), torch.float32, True)
    expected = {
        "crash": "RuntimeError: out of resource: shared memory", "gradient": "a gradient is off by",
        "value": "a result is off by", "nan": "a result is off by nan",
    }[fault]  # fmt: skip
    assert found.startswith(expected)
    assert "\n" not in found
    assert fault != "gradient" or examples.problem(OP, "torch", torch.device("cpu"), torch.float32, False) is None


@pytest.mark.parametrize("size", [examples.SMALL, examples.PUBLISHED], ids=["small", "published"])
@pytest.mark.parametrize("op, kind", [(op, kind) for op in sorted(_backends.OFFERS) for kind in examples.kinds(op)])
def test_the_examples_show_what_they_should(op, kind, size):
    # Saturated scores or gradients of nothing would hide a broken kernel.
    results = examples.outcome(op, "reference", "cpu", torch.float64, size=size, kind=kind)
    largest = max(x.abs().max().item() for x in results if x.numel())
    assert largest > 0.1
    if op != "hardest_negative_loss":
        assert results[0].std() > 1e-3 * largest
    for dtype in (torch.float16, torch.bfloat16):
        narrow = examples.outcome(op, "reference", "cpu", dtype, size=size, kind=kind)
        assert all(x.isfinite().all() for x in narrow)


@pytest.mark.parametrize("capability,tiles", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 80)])
def test_a_gpu_takes_the_tiles_that_its_shared_memory_holds(gpu, capability, tiles):
    pytest.importorskip("triton", reason="triton is not installed")
    from itm_fast.kernels import _launch

    gpu.capability = capability
    assert _launch.arch(CUDA) == tiles
